"""Splicing against an exact rebuild, on the real base and real text.

Design 2.3: a window of standard library source in which four blocks are
collapsed, one of them holding a fact; a refocus expands that block and
collapses another. The splice runs the LM on what changed; the rebuild runs
the whole window again. Both then score the same next tokens.
"""

import inspect
import textwrap

import numpy as np
import pytest

from mcjax.config import Config
from mcjax.gist.encoder import load_gistnet
from mcjax.runtime.text_files import read_documents
from mcjax.testing import tiny_base
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM

TRIALS = 24
BLOCKS = 12  # complete blocks of every window
FACTS = (
  ("The access code of the pump house is", " 7314."),
  ("The chief pilot of the harbour is", " Marit Solheim."),
  ("The signal tower answers to the name", " Copper Heron."),
  ("The tide service listens on port", " 48210."),
  ("Backups of the movement database are in", " Reykjavik."),
  ("The ferry to Skarvoy leaves from berth", " seventeen."),
)


@pytest.fixture(scope="module")
def gistnet(smollm2):
  return load_gistnet(smollm2)


@pytest.fixture(scope="module")
def source(smollm2):
  """Token ids [n] of a module of the standard library."""
  document = next(read_documents([inspect.getsourcefile(textwrap)]))
  return smollm2.tokenizer.encode(document.text)


def trial_ids(tokenizer, source, number):
  """History, question, scored tokens, and the block that holds the fact.

  In even trials the question begins a sentence of the fact anew and its end is
  scored; in odd ones there is none, and the next 32 tokens of the source are
  scored.
  """
  rng = np.random.RandomState(number)
  size = BLOCKS * BRANCHING
  start = rng.randint(0, len(source) - size - BRANCHING)
  history = source[start : start + size].copy()
  block = int(rng.randint(2, BLOCKS - 4))
  question, answer = FACTS[number // 2 % len(FACTS)]
  fact = tokenizer.encode(f"\n# {question}{answer}\n")
  at = block * BRANCHING + (BRANCHING - len(fact)) // 2
  history[at : at + len(fact)] = fact
  if number % 2:
    scored = source[start + size : start + size + BRANCHING]
    return history, np.zeros(0, np.int32), scored, block
  question = tokenizer.encode(f"\n# {question}")
  return history, question, tokenizer.encode(answer), block


def nodes_of(gists):
  """Tokens, and the blocks in `gists` at L1."""
  nodes = []
  for block in range(BLOCKS):
    first = block * BRANCHING
    nodes += [(1, block)] if block in gists else [
      (0, first + k) for k in range(BRANCHING)
    ]
  return nodes


def row_of(window, start):
  return int(np.searchsorted(window.entries.start(), start))


def append(context, tree, count):
  """Shows the next tokens of the tree, not run yet."""
  context.window.append_tokens(context.window.take_slots(count))
  context.load_unready(tree)


def score(context, tree, tokens):
  """Mean NLL of tokens that the tree holds behind the window."""
  append(context, tree, len(tokens))
  context.sync(renew=len(tokens) + 1)
  return context.newest_nll(tokens).mean()


def one_trial(lm, gistnet, source, number):
  """Mean NLL collapsed, spliced and exact, of one refocus.

  As in `generate`, a question enters the window before the refocus and is run
  after it, so that it sees what was opened.
  """
  history, question, scored, block = trial_ids(lm.tokenizer, source, number)
  tree = MegaContextTree.create(
    tiny_base.memory_url(), base_fingerprint=lm.fingerprint,
    base_name=lm.name, encoder=gistnet, vocab_size=lm.config.vocab_size,
  )
  tree.append(np.concatenate([history, question, scored]))
  show_gists = number % 4 < 2
  context = ContextLM(lm, Config(window=512), show_gists)
  others = [b for b in range(1, BLOCKS - 2) if b != block]
  shut, *gists = np.random.RandomState(number).permutation(others)[:4].tolist()
  context.window.retile(nodes_of({block, *gists}))
  context.load_unready(tree)
  context.sync()
  append(context, tree, len(question))

  snapshot = context.snapshot()
  context.sync()
  collapsed = score(context, tree, scored)
  context.restore(snapshot)

  window = context.window
  window.collapse(row_of(window, shut * BRANCHING), step=0)
  window.expand(row_of(window, block * BRANCHING), step=0)
  context.load_unready(tree)
  before = context.tokens_run
  context.sync()
  run = context.tokens_run - before
  new = max(1, len(question))  # the newest token is always run
  assert run == BRANCHING + show_gists + new, "swapped in, and what is new"
  assert run < 0.2 * window.cost

  spliced = score(context, tree, scored)
  context.forget()
  context.load_unready(tree)
  before = context.tokens_run
  context.sync(renew=len(scored) + 1)
  assert context.tokens_run - before > 250, "a rebuild runs the whole window"
  exact = context.newest_nll(scored).mean()
  tree.close()
  return collapsed, spliced, exact


@pytest.mark.slow
def test_splicing_costs_less_than_a_hundredth_of_a_nat(
  smollm2, gistnet, source
):
  losses = np.array([
    one_trial(smollm2, gistnet, source, number) for number in range(TRIALS)
  ])
  collapsed, spliced, exact = losses.T
  change = spliced - exact
  facts = np.arange(TRIALS) % 2 == 0
  print(
    f"\nsplice - exact over {TRIALS} trials: mean {change.mean():+.4f}, "
    f"mean size {np.abs(change).mean():.4f}, largest "
    f"{np.abs(change).max():.4f} nats"
  )
  for name, rows in (("facts", facts), ("source", ~facts)):
    print(
      f"{name}: collapsed {collapsed[rows].mean():.3f}, spliced "
      f"{spliced[rows].mean():.3f}, exact {exact[rows].mean():.3f}"
    )
  assert abs(change.mean()) <= 0.01
  assert change[facts].mean() <= 0.01
  # The refocus is what makes the fact known, spliced or not.
  assert collapsed[facts].mean() > exact[facts].mean() + 1
