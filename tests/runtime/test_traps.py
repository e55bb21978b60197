"""The traps of the design's section 7: each is put back, and noticed.

Every test shows the sound behaviour and that the check fails on a broken
variant. Traps of training (parameters outside the optimizer) are tested with
the trainer, those of GistNet's attention with GistNet, and those of LensNet's
with LensNet.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import Config, MegaContext
from mcjax.base import decoder_layer
from mcjax.gist.encoder import apply as gistnet_apply
from mcjax.testing import tiny_base
from mcjax.testing.tree_reference import TinyEncoder
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, McjaxError
from mcjax.window import invariants, kv_slots
from mcjax.window.context_lm import ContextLM
from mcjax.window.invariants import InvariantError
from mcjax.window.working_context import Entries, WorkingContext


def random_ids(count, seed=0):
  return np.random.RandomState(seed).randint(0, tiny_base.VOCAB, count).astype(
    np.int32
  )


@pytest.fixture
def mc(tiny_lm, tiny_gistnet):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(window=512, recent_tokens=64, gists_per_level=8,
           gist_attention="visible"),
    gistnet=tiny_gistnet,
  )
  yield mc
  mc.close()


# --- Targets misaligned beside a gist ----------------------------------------


def copying(lm):
  """A base that is sure the next token equals the one it has just seen."""
  vocab, d = tiny_base.VOCAB, 32
  rng = np.random.RandomState(0)
  codes = rng.standard_normal((vocab, d)).astype(np.float32)
  codes /= np.linalg.norm(codes, axis=1, keepdims=True)
  layers = {
    k: jnp.zeros_like(v) if k in ("wo", "w_down") else v
    for k, v in lm.params["layers"].items()
  }
  return dataclasses.replace(lm, params=lm.params | {
    "embed": jnp.asarray(codes), "unembed": jnp.asarray(20 * codes.T),
    "layers": layers,
  })


def test_random_tokens_cost_ln_v_and_a_leak_would_show(mc, tiny_lm):
  """No base can do better on i.i.d. tokens than ln V, in the mean.

  One that repeats what it sees would score the very token it was given if
  targets were not shifted: a loss near 0 shows that trap.
  """
  ln_v = np.log(tiny_base.VOCAB)
  encoder = tiny_base.gistnet(copying(tiny_lm), spread=0.05)
  losses = {}
  for name, lm in (("uniform", tiny_base.uniform(tiny_lm)),
                   ("random", tiny_lm), ("copying", copying(tiny_lm))):
    other = MegaContext.create(
      tiny_base.memory_url(), lm, mc.config,
      gistnet=encoder if name == "copying" else mc._loop._encoder,
    )
    other.ingest_tokens(random_ids(2000))
    losses[name] = other._loop.score(random_ids(600, 1))
    other.close()
  np.testing.assert_allclose(losses["uniform"], ln_v, rtol=1e-6)
  assert losses["random"].mean() > ln_v
  assert losses["copying"].mean() > ln_v + 1


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_target_is_noticed(mc, tiny_lm, monkeypatch, shift):
  """Scoring token p or p + 2 from position p."""
  mc.ingest_tokens(random_ids(100))
  ids = random_ids(64, 1)
  history = mc.tree.tokens(0, mc.cursor)
  expected = tiny_base.plain_nll(tiny_lm, np.concatenate([history, ids]))
  expected = expected[mc.cursor :]
  np.testing.assert_allclose(mc._loop.score(ids), expected, atol=1e-4)
  real = ContextLM._nll

  def broken(self, hidden, rows, token_ids):
    return real(self, hidden, rows + shift, token_ids)

  monkeypatch.setattr(ContextLM, "_nll", broken)
  wrong = mc._loop.score(ids)
  assert not np.allclose(wrong, expected, atol=1e-4)
  # Put back before a base that repeats its input, the leak is plain to see.
  if shift == 1:
    lm = copying(tiny_lm)
    leaky = MegaContext.create(
      tiny_base.memory_url(), lm, mc.config,
      gistnet=tiny_base.gistnet(lm),
    )
    leaky.ingest_tokens(random_ids(100))
    assert leaky._loop.score(random_ids(64, 1)).mean() < 0.5
    leaky.close()


# --- A collapse into the gist of other tokens --------------------------------


class Careless(WorkingContext):
  """Collapses any 32 entries into the gist that contains the first."""

  def sibling_groups(self):
    groups = np.zeros(len(self.entries), bool)
    groups[: len(groups) - BRANCHING + 1] = True
    return groups


def test_a_collapse_of_5_to_37_into_the_gist_of_0_to_32_is_noticed(mc):
  mc.ingest(tiny_base.text(200))
  with pytest.raises(McjaxError, match="32 siblings"):
    mc._loop.context.window.collapse(5, step=0)
  broken = Careless(512)
  broken.entries = mc._loop.context.window.entries
  broken._free = mc._loop.context.window._free
  broken.collapse(5, step=0)
  with pytest.raises(InvariantError, match="contiguity"):
    invariants.check_window(broken, mc.cursor, max_level=1)


def test_coverage_alone_is_not_enough(mc):
  """Right spans, but one slot still holds what it held before the edit."""
  mc.ingest(tiny_base.text(2000))
  context, window = mc._loop.context, mc._loop.context.window
  mc.next_logits()
  window.expand(int(np.flatnonzero(window.entries.level == 1)[0]), step=0)
  invariants.check_window(window, mc.cursor, max_level=1)
  with pytest.raises(InvariantError, match="tree-window consistency"):
    invariants.check_contents(context, mc.tree)
  context.load_unready(mc.tree)
  invariants.check_contents(context, mc.tree)


# --- Causal attention inside GistNet -----------------------------------------


def test_a_causal_gistnet_is_noticed(tiny_gistnet, monkeypatch):
  """A slot in front of its block sees nothing under a causal mask."""
  params, config = tiny_gistnet.params, tiny_gistnet.config
  x = jnp.asarray(
    np.random.RandomState(0).standard_normal((1, 32, 32)).astype(np.float32)
  )

  def reach():
    def residual(x):  # without the last child's own vector
      return gistnet_apply(params, config, x) - x[:, -1:]

    jacobian = jax.jacrev(residual)(x)
    return np.abs(np.asarray(jacobian)).sum(axis=(0, 1, 2, 3, 5))

  assert (reach() > 1e-6).all()
  real = jax.nn.softmax

  def causal(scores, axis=-1):
    if axis == -1:
      rows, columns = scores.shape[-2:]
      old = jnp.arange(columns)[None, :] <= jnp.arange(rows)[:, None]
      scores = jnp.where(old[None, None], scores, -1e30)
      return real(scores, axis=-1)
    return real(scores, axis=axis) * np.float32(0)  # no copies either

  monkeypatch.setattr(jax.nn, "softmax", causal)
  assert not (reach() > 1e-6).all()


# --- Windows of unequal coverage ---------------------------------------------


def test_every_policy_and_mode_covers_the_same_history(tiny_lm, tiny_gistnet):
  """Whoever is compared has the whole history and scores the same tokens."""
  text, scored = tiny_base.text(2500), tiny_base.text(100, 1)
  lengths = set()
  for policy in ("similarity", "random", "recency", "lensnet", "oracle"):
    for kv in ("splice", "exact"):
      mc = MegaContext.create(
        tiny_base.memory_url(), tiny_lm,
        Config(window=512, policy=policy, kv=kv, check_invariants=True),
        gistnet=tiny_gistnet,
      )
      mc.ingest(text)
      focus = mc.focus()
      assert focus[0].start == 0 and focus[-1].stop == mc.cursor == 2501
      lengths.add((len(mc.score(scored)), sum(e.stop - e.start for e in focus)))
      mc.close()
  assert lengths == {(100, 2501)}


def test_a_dropped_stretch_is_noticed(mc):
  """A sliding window has the same length and sees less."""
  mc.ingest(tiny_base.text(2000))
  window = mc._loop.context.window
  twin = window.copy()
  twin.entries = Entries(*(a[50:] for a in window.entries.arrays()))
  twin.give_slots(window.entries.slot[:50])
  with pytest.raises(InvariantError, match="contiguity"):
    invariants.check_window(twin, mc.cursor, max_level=1)


# --- Compressor calls, zero vectors, incomplete blocks -----------------------


def tree_of(encoder):
  return MegaContextTree.create(
    tiny_base.memory_url(), base_fingerprint="t", base_name="t",
    encoder=encoder, vocab_size=tiny_base.VOCAB,
  )


def test_64_tokens_take_one_call_for_two_blocks():
  encoder = TinyEncoder()
  tree = tree_of(encoder)
  tree.append(random_ids(64))
  assert encoder.calls == [(1, 2)]
  encoder.calls.clear()
  for token in random_ids(64, 1):
    tree.append([token])
  assert encoder.calls == [(1, 1), (1, 1)]
  encoder.calls.clear()
  tree.append(random_ids(2048 - 128, 2))
  assert encoder.calls == [(1, 60), (2, 2)]


def test_decoding_encodes_every_block_once(mc, monkeypatch):
  mc.ingest(tiny_base.text(990))  # 991 tokens with BOS
  calls = []
  encoder = mc.tree._encoder
  real = encoder.encode_tokens
  mc._loop.warm_up()
  monkeypatch.setattr(
    encoder, "encode_tokens", lambda ids: calls.append(len(ids)) or real(ids)
  )
  mc.generate("x", max_new_tokens=64)  # completes [960, 1056): 3 blocks
  assert calls == [1, 1, 1]


def test_zero_vectors_after_a_multi_block_append_are_noticed():
  class Forgetful(TinyEncoder):
    """Fills in the first block of a batch only."""

    def encode_tokens(self, token_ids):
      out = super().encode_tokens(token_ids)
      out[1:] = 0
      return out

  for encoder, sound in ((TinyEncoder(), True), (Forgetful(), False)):
    tree = tree_of(encoder)
    tree.append(random_ids(200))
    if sound:
      invariants.check_tree(tree, encoder)
    else:
      with pytest.raises(InvariantError, match="zero gist"):
        invariants.check_tree(tree)


def test_a_gist_of_an_incomplete_block_is_noticed(monkeypatch):
  tree = tree_of(TinyEncoder())
  tree.append(random_ids(100))
  assert tree.num_nodes(1) == 3
  with pytest.raises(IndexError):
    tree.gists(1, 3, 4)
  monkeypatch.setattr(tree, "num_nodes", lambda level: -(-100 // 32**level))
  with pytest.raises(InvariantError, match="complete nodes"):
    invariants.check_tree(tree)


# --- O(history) work per step ------------------------------------------------


def turn_cost(tiny_lm, tiny_gistnet, history, careless=False):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(window=512, recent_tokens=64, gists_per_level=8, search_nodes=32),
    gistnet=tiny_gistnet,
  )
  mc.ingest_tokens(np.resize(random_ids(5000) % 256, history - 1))
  if careless:
    policy = mc._loop._policy
    real = policy.score

    def score(view):
      view.tree.gists(1, 0, view.tree.num_nodes(1))  # "just" the L1 level
      return real(view)

    policy.score = score
  before = sum(mc.tree.reads.values())
  mc.generate("what now?", max_new_tokens=64)
  cost = sum(mc.tree.reads.values()) - before
  mc.close()
  return cost


def test_a_whole_level_read_per_step_is_noticed(tiny_lm, tiny_gistnet):
  costs = [
    [turn_cost(tiny_lm, tiny_gistnet, history, careless)
     for history in (5_000, 100_000)]
    for careless in (False, True)
  ]
  assert costs[0][1] <= 1.5 * costs[0][0] + 300
  # What is read besides does not hide it.
  careless = [b - a for a, b in zip(*costs)]
  assert careless[1] > 1.5 * careless[0] + 300


# --- A causal mask aligned top-left ------------------------------------------


def test_a_mask_that_ignores_positions_is_noticed(mc, tiny_lm, monkeypatch):
  """`is_causal=True` lets query i see keys 0..i, wherever they belong."""
  mc.ingest(tiny_base.text(400))
  expected = tiny_base.window_logits(mc._loop.context, mc.tree)
  np.testing.assert_allclose(mc.next_logits(), expected, atol=1e-4)
  real = decoder_layer.attend

  def top_left(config, query, segments, tables, q_positions, rope_on):
    rows = jnp.arange(query.shape[0], dtype=q_positions.dtype)
    segments = [
      (k, v, jnp.arange(k.shape[1], dtype=p.dtype), *rest)
      for k, v, p, *rest in segments
    ]
    return real(config, query, segments, tables, rows, rope_on)

  monkeypatch.setattr(decoder_layer, "attend", top_left)
  kv_slots.splice.clear_cache()
  try:
    mc._loop.context.forget()
    broken = mc.next_logits()
  finally:
    monkeypatch.undo()
    kv_slots.splice.clear_cache()
  assert np.abs(broken - expected).max() > 1e-2


# --- Gists that crowd attention ----------------------------------------------


def test_nll_beside_gists_can_be_tracked(tiny_lm, tiny_gistnet):
  """The same text scored with gists shown and masked: what they change.

  Gists are masked unless the GistNet is trained, so an untrained one changes
  nothing; shown ones do.
  """
  nll = {}
  for shown in ("auto", "masked", "visible"):
    mc = MegaContext.create(
      tiny_base.memory_url(), tiny_lm,
      Config(window=512, gist_attention=shown), gistnet=tiny_gistnet,
    )
    mc.ingest(tiny_base.text(2500))
    nll[shown] = mc.score(tiny_base.text(64, 1))
    mc.close()
  assert not tiny_gistnet.trained
  np.testing.assert_array_equal(nll["auto"], nll["masked"])
  assert np.abs(nll["visible"] - nll["masked"]).mean() > 1e-3


# --- Mixed signs and denominators --------------------------------------------


def test_swap_rate_is_over_refocus_steps_not_over_tokens(mc):
  mc.ingest(tiny_base.text(3000))
  mc.generate("what is it?", max_new_tokens=200)
  count = mc.telemetry.counters
  assert count["edits"] > 0
  rate = count["edits"] / count["refocus_steps"]
  assert mc.telemetry.swap_rate == rate
  assert rate != pytest.approx(count["edits"] / count["decoded_tokens"])
  steps = [r for r in mc.telemetry.records if r["kind"] == "refocus"]
  assert np.mean([len(r["edits"]) for r in steps]) == pytest.approx(rate)
