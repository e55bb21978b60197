"""Splices that run together: as alone, and whatever happens to one of them."""

import threading
import time

import numpy as np
import pytest

from mcjax.testing import tiny_base
from mcjax.window import kv_slots
from mcjax.window.decoding import Decoder
from mcjax.window.slot_inputs import Inputs

ROWS, SLOTS, COUNT = 4, 64, 20


@pytest.fixture(scope="module")
def lm():
  """Reads gists through an adapter and low-rank maps."""
  return tiny_base.adapted(tiny_base.make_lm())


def decoder_of(lm, splices=ROWS):
  return Decoder(lm.params, lm.config, ROWS, SLOTS, np.float32,
                 np.full(kv_slots.STOP_IDS, -1, np.int32), (8, 24), splices)


def work_of(lm, row):
  """Two splices of a row: what both need, and the second after a move."""
  rng = np.random.RandomState(row)
  slots = rng.permutation(SLOTS)[:COUNT]
  inputs = Inputs(
    rng.randint(0, 256, COUNT).astype(np.int32),
    rng.randn(COUNT, lm.config.d_model).astype(np.float32),
    rng.rand(COUNT) < 0.3)
  out = []
  for part, start in ((slice(COUNT), 0), (slice(12, COUNT), 3 * row)):
    positions, visible = np.zeros(SLOTS, np.int32), np.zeros(SLOTS, bool)
    positions[slots], visible[slots] = np.arange(start, start + COUNT), True
    out.append((slots[part], Inputs(*(a[part] for a in inputs)),
                (positions, visible)))
  return out


def all_at_once(decoder, works, run=None):
  """What each thread's splice gives, all waiting for a turn that is taken."""
  out = [None] * len(works)

  def ask(row, work):
    try:
      splice = run or decoder.splice
      out[row] = np.asarray(splice(0, row, *work))[: len(work[0])]
    except BaseException as error:
      out[row] = error

  threads = [threading.Thread(target=ask, args=pair)
             for pair in enumerate(works)]
  with decoder.turn:
    for n, thread in enumerate(threads):
      thread.start()
      while len(decoder.splicer._waiting) <= n:
        time.sleep(0.001)
  for thread in threads:
    thread.join()
  assert not decoder.splicer._waiting
  return out


def alone(lm, rounds=2):
  """The same a row at a time, and what the rows hold then."""
  decoder = decoder_of(lm, 1)
  out = [[np.asarray(decoder.splice(0, row, *work))[: len(work[0])]
          for row in range(ROWS) for work in [work_of(lm, row)[n]]]
         for n in range(rounds)]
  return out, [decoder.read(row) for row in range(ROWS)]


@pytest.fixture(scope="module")
def expected(lm):
  return alone(lm)


def compare(decoder, out, expected, rows=range(ROWS)):
  for row in rows:
    np.testing.assert_allclose(out[row], expected[0][-1][row], atol=2e-5)
    for ours, theirs in zip(decoder.read(row), expected[1][row]):
      for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_together_are_as_each_alone(lm, expected):
  decoder = decoder_of(lm)
  for n in range(2):
    out = all_at_once(decoder, [work_of(lm, row)[n] for row in range(ROWS)])
    for row in range(ROWS):
      np.testing.assert_allclose(out[row], expected[0][n][row], atol=2e-5)
  compare(decoder, out, expected)
  assert (decoder.splicer.done, decoder.splicer.runs) == (2 * ROWS, 2)


def test_what_is_only_looked_at_is_not_stored(lm):
  decoder = decoder_of(lm)
  all_at_once(decoder, [work_of(lm, row)[0] for row in range(ROWS)],
              lambda *args: decoder.splice(*args, store=args[1] == 2))
  held = [np.asarray(decoder.read(row)[0].keys).any() for row in range(ROWS)]
  assert held == [False, False, True, False] and decoder.splicer.runs == 1


def test_too_few_to_fill_half_a_group_run_alone(lm):
  decoder = decoder_of(lm)
  decoder.splice(0, 3, *work_of(lm, 3)[0])
  works = [work_of(lm, row)[0] for row in range(2)]
  all_at_once(decoder, [works[0], work_of(lm, 1)[1]])  # of two sizes
  assert (decoder.splicer.done, decoder.splicer.runs) == (3, 3)
  all_at_once(decoder, works)
  assert (decoder.splicer.done, decoder.splicer.runs) == (5, 4)


def test_a_group_that_fails_is_run_one_by_one(lm, expected, caplog):
  """So that the one at fault meets its error, and nobody else does."""
  decoder = decoder_of(lm)
  for n in range(2):
    works = [work_of(lm, row)[n] for row in range(ROWS)]
    slots, inputs, seen = works[2]
    works[2] = slots, inputs, (seen[0][:9], seen[1])  # too few positions
    out = all_at_once(decoder, works)
    assert isinstance(out[2], Exception)
  compare(decoder, out, expected, (0, 1, 3))
  assert "each runs by itself" in caplog.text


def test_an_interrupt_ends_its_own_splice_alone(lm, expected, monkeypatch):
  """That of whoever runs all of them: the others are run again."""
  decoder, real, hits = decoder_of(lm), kv_slots.splice_rows, []

  def cut(*args):
    hits.append(args)
    if len(hits) == 1:
      raise KeyboardInterrupt
    return real(*args)

  monkeypatch.setattr(kv_slots, "splice_rows", cut)
  works = [work_of(lm, row) for row in range(ROWS)]
  out = all_at_once(decoder, [work[0] for work in works])
  assert isinstance(out[0], KeyboardInterrupt) and len(hits) == 2
  decoder.splice(0, 0, *works[0][0])
  out = all_at_once(decoder, [work[1] for work in works])
  compare(decoder, out, expected)


def test_an_interrupt_while_waiting_leaves_nothing_to_run(lm, monkeypatch):
  decoder, (work, _) = decoder_of(lm), work_of(lm, 1)

  class Interrupted(threading.Event):
    def wait(self, timeout=None):
      raise KeyboardInterrupt

  with decoder.turn, monkeypatch.context() as patch:
    patch.setattr(threading, "Event", Interrupted)
    with pytest.raises(KeyboardInterrupt):
      decoder.splice(0, 1, *work)
  decoder.splice(0, 0, *work)
  assert (decoder.splicer.done, decoder.splicer._waiting) == (1, [])
  assert not np.asarray(decoder.read(1)[0].keys).any()
