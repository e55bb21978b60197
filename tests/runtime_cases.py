"""What the tests of MegaContext share: sizes, and what it holds."""

import threading
import time

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


# --- Many histories at once -------------------------------------------------


def life_of(mc, i):
  """A document with a fact, a question about it, and answers of other kinds."""
  text = tiny_base.text(600 + 37 * i, i).replace(".", " ")
  mc.ingest(f"{text}. THE PUMP CODE IS {7000 + i}. {tiny_base.text(300, i)}")
  return [
    mc.generate(QUESTION, 40 + 3 * i).token_ids.tolist(),
    mc.generate("and then", 30, temperature=0.8 * (i % 2), seed=i
                ).token_ids.tolist(),
    mc.generate("and if", 35, remember=False).token_ids.tolist(),
    "".join(mc.stream("say", 20)),
  ]


def lived_together(engine, count, work):
  """What `work` gives for each of so many histories, all at once."""
  out, errors = [None] * count, []

  def live(i):
    try:
      with engine.create(tiny_base.memory_url()) as mc:
        out[i] = work(mc, i)
    except BaseException as error:
      errors.append(error)

  threads = [threading.Thread(target=live, args=(i,)) for i in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors, errors[:3]
  return out


def ask_at_once(engine, count):
  """So many histories alike, whose splices wait for the same turn."""
  def ask(mc):
    mc.generate(QUESTION, 8)

  engine.warm_up()
  mcs = [engine.create(tiny_base.memory_url()) for _ in range(count)]
  threads = [threading.Thread(target=ask, args=(mc,)) for mc in mcs]
  decoder = mcs[0].context.decoder
  with decoder.turn:
    for thread in threads:
      thread.start()
    while len(decoder.splicer._waiting) < count:
      time.sleep(0.001)
  for thread in threads:
    thread.join()
