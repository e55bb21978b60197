"""What the tests of MegaContext share: sizes, and what it holds."""

from mcjax.testing import tiny_base

WINDOW = 512
SMALL = dict(window=WINDOW, recent_tokens=64, gists_per_level=8)
FACT = "THE PUMP CODE IS 7314."
QUESTION = "what is the PUMP CODE?"


def with_fact(mc, tokens, at):
  """Ingests lower-case tokens with the fact in upper case at one of them."""
  text = tiny_base.text(tokens, 3)
  mc.ingest(text[:at] + FACT + text[at + len(FACT) :])
  return mc


def state_of(mc):
  """What a call that is not remembered must leave as it was."""
  tree = mc.tree
  levels = range(1, tree.top_level + 1)
  return dict(
    cursor=mc.cursor, committed=tree.committed, extra=tree.extra,
    focus=mc.focus(), tokens=tree.tokens(0, mc.cursor).tolist(),
    gists=[tree.gists(l, 0, tree.num_nodes(l)).tobytes() for l in levels],
    access=[
      tree.access_counts(l, 0, tree.num_nodes(l)).tolist() for l in levels
    ],
    step=mc._loop.step,
  )


def settled_logits(mc):
  """Logits that another `next_logits` repeats bit by bit.

  Each call runs the newest token again, now in a chunk of its own.
  """
  mc.next_logits()
  return mc.next_logits()


def window_logits(mc):
  """Logits [V] of a plain forward of what the window shows."""
  return tiny_base.window_logits(mc._loop.context, mc.tree)


def spans(out):
  """(start, stop) of an answer's sources."""
  return [(source.start, source.stop) for source in out.sources]
