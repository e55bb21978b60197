"""The slot cache's jitted functions: padding, sizes, what they write."""

import jax
import numpy as np
import pytest

from mcjax.testing import tiny_base
from mcjax.window import kv_slots

SLOTS = 64


def arrays(count=20, seed=0):
  """A state whose first `count` timeline entries lie in shuffled slots."""
  rng = np.random.RandomState(seed)
  lm = tiny_base.make_lm()
  state = kv_slots.init(lm.config, SLOTS, lm.params["embed"].dtype)
  slots = rng.permutation(SLOTS)[:count].astype(np.int32)
  ids = rng.randint(0, 256, count).astype(np.int32)
  state = state._replace(
    inputs=kv_slots.load_tokens(lm.params, state.inputs, slots, ids)
  )
  positions = np.zeros(SLOTS, np.int32)
  positions[slots] = np.arange(count)
  visible = np.zeros(SLOTS, bool)
  visible[slots] = True
  return lm, state, slots, ids, positions, visible


def padded(slots, size):
  return np.concatenate([slots, np.full(size - len(slots), SLOTS, np.int32)])


def test_inputs_go_to_their_slots_and_padding_nowhere():
  lm, state, slots, ids, *_ = arrays()
  table = np.asarray(lm.params["embed"])
  inputs = np.asarray(state.inputs)
  np.testing.assert_array_equal(inputs[slots], table[ids])
  rest = np.setdiff1d(np.arange(SLOTS), slots)
  assert not inputs[rest].any()
  gists = np.full((8, 32), 3.0, np.float32)
  after = kv_slots.load_gists(state.inputs, padded(slots[:2], 8), gists)
  changed = np.flatnonzero((np.asarray(after) != inputs).any(axis=1))
  assert set(changed) == set(slots[:2].tolist())


@pytest.mark.parametrize("size", [20, 24, 56])
def test_a_splice_of_everything_is_a_plain_forward(size):
  lm, state, slots, ids, positions, visible = arrays()
  state, hidden = kv_slots.splice(
    lm.params, lm.config, state, padded(slots, size), positions, visible
  )
  x = np.asarray(lm.params["embed"])[ids]
  plain = tiny_base.plain_logits(lm, x, np.arange(20))
  for row in (0, 7, 19):
    np.testing.assert_allclose(
      kv_slots.next_logits(lm.params, hidden, np.int32(row)), plain[row],
      atol=1e-4,
    )
  targets = np.zeros(size, np.int32)
  targets[:19] = ids[1:]
  np.testing.assert_allclose(
    kv_slots.nll(lm.params, hidden, targets)[:19],
    tiny_base.plain_nll(lm, ids)[1:], atol=1e-4,
  )
  rest = np.setdiff1d(np.arange(SLOTS), slots)
  assert not np.asarray(state.keys)[:, :, rest].any()


def test_a_peek_equals_a_splice_and_does_not_donate():
  lm, state, slots, _, positions, visible = arrays()
  args = padded(slots, 24), positions, visible
  before = jax.tree.map(np.asarray, state)
  peeked = kv_slots.peek(lm.params, lm.config, state, *args)
  for a, b in zip(before, state):
    np.testing.assert_array_equal(a, b)
  _, hidden = kv_slots.splice(lm.params, lm.config, state, *args)
  np.testing.assert_allclose(peeked[:20], hidden[:20], atol=2e-5)


def test_a_rewritten_slot_is_not_seen_in_its_old_state():
  lm, state, slots, _, positions, visible = arrays()
  spoiled = state._replace(
    keys=state.keys + np.float32(7), values=state.values - np.float32(5)
  )
  args = padded(slots, 24), positions, visible
  clean = kv_slots.peek(lm.params, lm.config, state, *args)
  dirty = kv_slots.peek(lm.params, lm.config, spoiled, *args)
  np.testing.assert_array_equal(clean[:20], dirty[:20])


def test_a_hidden_entry_changes_nothing_behind_it():
  lm, state, slots, _, positions, visible = arrays()
  args = lm.params, lm.config
  masked = visible.copy()
  masked[slots[5]] = False
  without = kv_slots.peek(*args, state, padded(slots, 24), positions, masked)
  other = state._replace(inputs=state.inputs.at[slots[5]].add(np.float32(2)))
  moved = kv_slots.peek(*args, other, padded(slots, 24), positions, masked)
  np.testing.assert_array_equal(without[6:20], moved[6:20])
  seen = kv_slots.peek(*args, other, padded(slots, 24), positions, visible)
  assert np.abs(np.asarray(seen[6:20] - without[6:20])).max() > 1e-3


@pytest.mark.parametrize("edits", [1, 2, 4, 9])
def test_splice_sizes_hold_every_plan(edits):
  sizes = kv_slots.splice_sizes(edits)
  assert list(sizes) == sorted(sizes) and len(sizes) == edits + 1
  for expands in range(edits + 1):
    run = 32 * expands + (edits - expands) + 1  # and the newest entry
    size = min(s for s in sizes if s >= run)
    assert size - run < 32 and size % 8 == 0
