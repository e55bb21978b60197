"""LensNet: bounded, not causal, blind to padding; its rows, keys and policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_base

from mcjax import (
  Config,
  MegaContext,
  gistnet,
  lens_rows,
  lensnet,
  lensnet_policy,
  meaning,
  reading,
)
from mcjax.lens_keyer import LensKeyer
from mcjax.lens_rows import BURIED, GIST, MARGIN, RAW, SPAN, TAIL, TAIL_GISTS
from mcjax.policies import FocusView
from mcjax.types import BRANCHING, McjaxError
from mcjax.working_context import WorkingContext

CONFIG = lensnet.LensNetConfig(
  d_model=16, width=16, heads=2, layers=2, feature_width=8, key_dim=8
)
ROWS = 24


@pytest.fixture(scope="module")
def params():
  """Untrained, and moved a bit so that no branch is silent."""
  start = lensnet.init_params(CONFIG)
  rng = np.random.RandomState(0)
  return jax.tree.map(
    lambda a: a + np.float32(0.1) * rng.standard_normal(a.shape).astype(
      np.float32
    ), start,
  )


def inputs(seed=0):
  rng = np.random.RandomState(seed)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

  mask = np.ones(ROWS, bool)
  mask[18:] = False
  tail_mask = np.ones(TAIL, bool)
  tail_mask[[3, 30]] = False
  query = np.full(lens_rows.QUERY, -1, np.int32)
  query[:9] = rng.randint(0, 40, 9)
  rarity = np.zeros(lens_rows.QUERY, np.float32)
  rarity[:9] = rng.uniform(1, 5, 9)
  given = lens_rows.LensInputs(
    rng.randint(0, 40, (ROWS, SPAN)).astype(np.int32), draw(ROWS, 16),
    rng.randint(0, 3, ROWS).astype(np.int32),
    rng.uniform(0, 4000, ROWS).astype(np.float32), mask, query,
    (rarity > 0).astype(np.float32), rarity,
    rng.randint(0, 40, 32).astype(np.int32),
    rng.uniform(1, 5, 32).astype(np.float32), np.float32(1), draw(TAIL, 16),
    tail_mask,
  )
  return jax.tree.map(jnp.asarray, given), draw(ROWS)


def reach(params, name):
  """|d score_i / d input_j| summed over channels: [ROWS, rows]."""
  given, match = inputs()

  def scores(x):
    if name == "match":
      return lensnet.apply(params, CONFIG, given, x)
    return lensnet.apply(params, CONFIG, given._replace(**{name: x}), match)

  x = match[:, None] if name == "match" else getattr(given, name)
  run = (lambda x: scores(x[:, 0])) if name == "match" else scores
  return np.abs(np.asarray(jax.jit(jax.jacrev(run))(x))).sum(-1)


@pytest.mark.parametrize("name", ["tail", "gists", "match"])
def test_every_input_reaches_every_score_and_masked_ones_none(params, name):
  """No causal mask: an old block sees the newest token, and the reverse."""
  given, _ = inputs()
  mask = np.asarray(given.tail_mask if name == "tail" else given.mask)
  seen = np.asarray(given.mask)
  got = reach(params, name)
  assert (got[seen][:, mask] > 1e-8).all()
  assert (got[:, ~mask] == 0).all() and (got[~seen] == 0).all()


def test_a_causal_mask_would_be_noticed(params, monkeypatch):
  """The trap: blocks that see only what stands before them."""
  real = jax.nn.softmax

  def causal(scores, axis):
    rows, columns = scores.shape[-2:]
    old = jnp.arange(columns)[None, :] <= jnp.arange(rows)[:, None]
    return real(jnp.where(old[None], scores, -1e30), axis)

  monkeypatch.setattr(jax.nn, "softmax", causal)
  lensnet.apply.clear_cache()
  try:
    got = reach(params, "tail")
  finally:
    lensnet.apply.clear_cache()
  given, _ = inputs()
  got = got[np.asarray(given.mask)][:, np.asarray(given.tail_mask)]
  assert not (got > 1e-8).all()


def test_scores_are_bounded_and_signed(params):
  given, match = inputs()
  scores = np.asarray(lensnet.apply(params, CONFIG, given, match))
  assert scores.shape == (ROWS,) and np.abs(scores).max() < 1
  assert scores.min() < 0 < scores.max()
  assert (scores[18:] == 0).all()
  huge = given._replace(gists=given.gists * np.float32(1e6))
  assert np.isfinite(lensnet.apply(params, CONFIG, huge, match)).all()


def test_the_order_of_rows_is_nothing_and_that_of_the_tail_matters(params):
  given, match = inputs()
  order = np.random.RandomState(1).permutation(ROWS)
  mixed = given._replace(**{
    k: getattr(given, k)[order]
    for k in ("ids", "gists", "state", "distance", "mask")
  })
  want = lensnet.apply(params, CONFIG, given, match)
  np.testing.assert_allclose(
    lensnet.apply(params, CONFIG, mixed, match[order]), want[order], atol=1e-6)
  whole = given._replace(tail_mask=jnp.ones(TAIL, bool))
  rolled = whole._replace(tail=jnp.roll(given.tail, 1, axis=0))
  difference = lensnet.apply(params, CONFIG, rolled, match) - lensnet.apply(
    params, CONFIG, whole, match)
  assert np.abs(difference).max() > 1e-4


def test_every_score_parameter_has_a_gradient(params):
  given, match = inputs()
  weights = np.random.RandomState(3).standard_normal(ROWS).astype(np.float32)
  gradients = jax.jit(jax.grad(
    lambda p: jnp.sum(lensnet.apply(p, CONFIG, given, match) * weights)
  ))(params)["score"]
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_features_by_hand():
  ids = np.full((3, SPAN), -1, np.int32)
  ids[0, MARGIN : MARGIN + 2] = [5, 6]  # the query's pair, inside
  ids[1, 0:2] = [5, 6]  # in the margin
  ids[2, MARGIN] = 9
  given, _ = inputs()
  query = np.full(lens_rows.QUERY, -1, np.int32)
  query[:3] = [5, 6, 7]
  rarity = np.zeros(lens_rows.QUERY, np.float32)
  rarity[:3] = [4, 1, 1]
  given = given._replace(
    ids=ids, state=np.array([RAW, GIST, BURIED], np.int32),
    distance=np.array([0, 128, 4096], np.float32), mask=np.ones(3, bool),
    query_ids=query, query_weights=(rarity > 0).astype(np.float32),
    query_rarity=rarity, newest_ids=np.full(32, 9, np.int32),
    newest_rarity=np.ones(32, np.float32), asked=np.float32(1))
  match = np.array([0.5, 0.0, -0.5], np.float32)
  x = np.asarray(lensnet.block_features(given, match))
  assert x.shape == (3, lensnet.FEATURES) and x.dtype == np.float32
  np.testing.assert_array_equal(x[:, :3], np.eye(3))
  np.testing.assert_allclose(x[1, 3], np.log2(5) / 16, rtol=1e-6)
  np.testing.assert_allclose(x[:, 5], [1, 0.5, 0])
  np.testing.assert_allclose(x[:, 6], [0.9, 0.45, 0], rtol=1e-5)  # 9 of 10
  np.testing.assert_allclose(x[:, 7], [0.5, 0.25, 0], rtol=1e-5)  # 1 of 2 pairs
  np.testing.assert_allclose(x[:, 10], match)
  np.testing.assert_allclose(x[:, 12], [0.4, 0.2, 0], rtol=1e-6)
  np.testing.assert_allclose(x[:, 13], [0, 0, 1], atol=1e-6)
  np.testing.assert_array_equal(x[:, 19], 1)
  plain = given._replace(asked=np.float32(0))
  assert not np.asarray(lensnet.block_features(plain, match))[:, 19:].any()


# --- Keys --------------------------------------------------------------------


def test_keys_are_the_same_on_host_and_device(tiny_lm):
  config = lensnet.LensNetConfig(d_model=32, key_dim=8)
  params = lensnet.init_params(config)
  keyer = LensKeyer(params, config, tiny_lm)
  ids = np.random.RandomState(0).randint(0, 300, (70, 32)).astype(np.int32)
  keys = keyer.encode_keys(ids)
  assert keys.dtype == np.int8 and keys.min() >= -127
  tables = lensnet.key_tables(params, config, tiny_lm.params["embed"])
  want = np.asarray(lensnet.block_keys(tables, ids)) * lensnet.KEY_SCALE
  np.testing.assert_allclose(keys, np.clip(want, -127, 127), atol=0.51)
  np.testing.assert_array_equal(keyer.encode_keys(ids[3:5]), keys[3:5])
  query = keyer.query(ids[0], np.ones(32, np.float32))
  padded = np.full(40, -1, np.int32)
  padded[:32] = ids[0]
  want = np.asarray(lensnet.query_key(
    tables, padded, jnp.ones(40))) * lensnet.KEY_SCALE
  np.testing.assert_allclose(query, np.clip(want, -127, 127), atol=0.51)


def test_a_query_finds_the_block_it_is_made_of(tiny_lm):
  config = lensnet.LensNetConfig(d_model=32, key_dim=32)
  keyer = LensKeyer(lensnet.init_params(config), config, tiny_lm)
  ids = np.random.RandomState(0).randint(0, 300, (70, 32)).astype(np.int32)
  keys = keyer.encode_keys(ids).astype(np.int32)
  for block in range(0, 70, 7):
    query = keyer.query(ids[block][:28], np.ones(28, np.float32))
    assert np.argmax(keys @ query) == block


# --- Rows --------------------------------------------------------------------


def test_rows_are_blocks_raw_as_gists_or_buried():
  window = WorkingContext(512)
  nodes = [(0, i) for i in range(32)] + [(1, i) for i in range(1, 32)]
  nodes += [(2, 1)] + [(0, 2048 + i) for i in range(40)]
  window.retile(nodes)
  rows = lens_rows.window_rows(window, [33, 5, 63, 64])
  np.testing.assert_array_equal(rows.block, [0, 64, *range(1, 32), 33, 63])
  np.testing.assert_array_equal(rows.state, [RAW] * 2 + [GIST] * 31
                                + [BURIED] * 2)
  np.testing.assert_array_equal(rows.entry[[0, 1, 2, -1]], [0, 64, 32, 63])


def view_of(mc, query_start=None):
  window = mc._loop.context.window
  query = mc._loop.query
  return FocusView(
    window.entries, mc.tree, query.ids, query.weights,
    query.start if query_start is None else query_start, False, 0, False,
    context_lm=mc._loop.context)


def opened(tiny_lm, tiny_gistnet, count, text=None, policy=None, **config):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(**{"window": 512, "policy": "lensnet", "recent_tokens": 64,
              "gists_per_level": 8, **config}),
    gistnet=tiny_gistnet, lensnet=policy,
  )
  mc.ingest(tiny_base.text(count) if text is None else text)
  return mc


def test_inputs_hold_tokens_gists_and_tail(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 2109)  # with <bos> 65 blocks, 30 tokens
  view = view_of(mc)
  rows = lens_rows.Rows(np.array([0, 1, 64]), np.zeros(3, np.int32),
                        np.zeros(3, np.int64))
  got = lens_rows.gather(
    view, rows, 8, mc._loop.context.token_embeddings, tiny_gistnet)
  ids = mc.tree.tokens(0, mc.cursor)
  np.testing.assert_array_equal(got.ids[0, :MARGIN], -1)
  np.testing.assert_array_equal(got.ids[0, MARGIN:], ids[: SPAN - MARGIN])
  np.testing.assert_array_equal(got.ids[1], ids[16:80])
  np.testing.assert_array_equal(got.ids[2, : 32 + MARGIN], ids[2032:2080])
  assert (got.ids[3:] == -1).all() and not got.mask[3:].any()
  np.testing.assert_array_equal(got.gists[1], mc.tree.gists(1, 1, 2)[0])
  np.testing.assert_array_equal(got.distance[:3], [2078, 2046, 30])
  np.testing.assert_array_equal(got.newest_ids, ids[-32:])
  coarse, fine = mc.tree.gists(2, 0, 2), mc.tree.gists(1, 61, 65)
  np.testing.assert_array_equal(got.tail[:2], coarse)
  np.testing.assert_array_equal(got.tail[2:TAIL_GISTS], fine)
  table = np.asarray(tiny_lm.params["embed"])
  np.testing.assert_array_equal(got.tail[TAIL_GISTS + 1 :], table[ids[-32:]])
  np.testing.assert_allclose(
    got.tail[TAIL_GISTS], tiny_gistnet.encode_tokens(ids[None, -32:])[0],
    rtol=1e-5)
  assert got.tail_mask.all()


def test_a_short_history_has_a_short_tail(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 20)
  rows = lens_rows.window_rows(mc._loop.context.window, [])
  got = lens_rows.gather(
    view_of(mc), rows, 8, mc._loop.context.token_embeddings, tiny_gistnet)
  assert not got.tail_mask[: TAIL_GISTS + 1].any()
  assert got.tail_mask[TAIL_GISTS + 1 :].sum() == 21
  assert (got.newest_ids >= 0).sum() == 21


# --- The policy --------------------------------------------------------------


def asked_view(mc, question):
  """The view of a question about the history as it is."""
  ids = mc.lm.tokenizer.encode(question)
  return dataclasses.replace(
    view_of(mc, query_start=mc.cursor), asked=True, query_ids=ids,
    query_weights=np.ones(len(ids), np.float32))


def buried_rows(mc, *offsets):
  """The window's rows and blocks below its first L2 entry; that entry."""
  e = mc._loop.context.window.entries
  coarse = int(np.flatnonzero(e.level == 2)[0])
  found = [int(e.index[coarse]) * 32 + k for k in offsets]
  return lens_rows.window_rows(mc._loop.context.window, found), coarse, found


def answer_scores(view, rows, scores):
  answers = lensnet_policy.find_answers(view, rows, scores)
  return lensnet_policy.entry_scores(view, rows, scores, answers=answers)


def test_an_answer_is_wished_for_and_other_raw_text_offered(
  tiny_lm, tiny_gistnet
):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  rows, coarse, found = buried_rows(mc, 3, 9)
  start = found[1] * BRANCHING
  words = mc.lm.tokenizer.decode(mc.tree.tokens(start, start + 9))
  view = asked_view(mc, words)
  scores = np.linspace(-0.1, 0.3, len(rows)).astype(np.float32)
  scores[-2:] = [0.4, 0.7]
  out = answer_scores(view, rows, scores)
  assert len(out) == len(view.entries)
  assert out[coarse] == np.float32(0.7)  # a coarse entry inherits
  assert (np.delete(out, coarse) <= 0).all()
  for at in rows.entry[rows.state == RAW]:
    assert (out[at : at + 32] <= -0.3).all()


def test_what_shares_little_of_the_question_is_no_rival(tiny_lm, tiny_gistnet):
  text = tiny_base.text(4000)
  fact, other = "THE PUMP CODE IS 7314.", "THE ROPE IS BLUE."
  mc = opened(tiny_lm, tiny_gistnet, 4000, text=(
    text[:1223] + other + text[1223 + len(other) : 1330] + fact
    + text[1330 + len(fact) :]))
  rows, coarse, _ = buried_rows(mc, 6, 9)
  view = asked_view(mc, "PUMP CODE")
  scores = np.full(len(rows), -0.1, np.float32)
  scores[-2:] = [0.8, 0.7]  # LensNet prefers the other one
  assert rows.block[-2:].tolist() == [38, 41]
  out = answer_scores(view, rows, scores)
  assert out[coarse] == np.float32(0.7)


def test_the_questions_own_blocks_stay(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  rows, _, _ = buried_rows(mc, 3)
  newest = int(rows.block[rows.state == RAW].max())
  view = dataclasses.replace(
    asked_view(mc, "x"), query_start=newest * BRANCHING - 5)
  scores = np.full(len(rows), -0.9, np.float32)
  scores[-1] = 0.7
  scores[rows.block == newest] = 0.9  # it is no answer to itself
  out = answer_scores(view, rows, scores)
  own = rows.entry[(rows.state == RAW) & (rows.block >= newest - 1)]
  assert len(own) == 2
  for at in own:
    assert (out[at : at + 32] == 0).all()


def test_text_read_on_gives_up_least_worth_first(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  view = view_of(mc)
  e = view.entries
  rows = lens_rows.window_rows(mc._loop.context.window, [])
  scores = np.linspace(-0.9, 0.9, len(rows)).astype(np.float32)
  out = lensnet_policy.entry_scores(view, rows, scores, {})
  newest = reading.newest_raw(e)
  assert (np.abs(out) < 0.2).all()  # nothing moves but to make room
  gists = rows.entry[rows.state == GIST]
  near = np.sort(rows.entry[(rows.state == RAW) & (rows.entry >= newest)])
  assert out[gists].max() < out[near].min()
  assert (np.diff(out[near]) > 0).all()  # the oldest goes first
  np.testing.assert_array_equal(  # among gists LensNet says which
    np.argsort(out[gists]), np.argsort(scores[rows.state == GIST]))


def test_text_gets_its_few_best_wishes_and_pays_for_them(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  window = mc._loop.context.window
  view = view_of(mc)
  rows = lens_rows.window_rows(window, [])
  scores = np.zeros(len(rows), np.float32)
  gists = np.flatnonzero(rows.state == GIST)
  many = {int(rows.block[row]): 0.7 - 0.01 * i for i, row in enumerate(gists)}
  out = lensnet_policy.entry_scores(view, rows, scores, many)
  assert (out > 0.2).sum() == 4  # few wishes at one time, the best ones
  assert (out[rows.entry[gists[:4]]] > 0.2).all()
  out = lensnet_policy.entry_scores(view, rows, scores, {})
  assert (out < 0.2).all()
  window.append_tokens(window.take_slots(window.free - 40))
  view = dataclasses.replace(view, entries=window.entries)
  one = {int(rows.block[gists[0]]): 0.5}
  out = lensnet_policy.entry_scores(view, rows, scores, one)
  wished = rows.entry[gists[0]]
  assert out[wished] > 0.2
  assert (np.delete(out, wished) < -0.2).all()  # it must be paid for


def test_a_question_without_an_answer_wishes_by_lensnet(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  view = dataclasses.replace(view_of(mc), asked=True)
  rows = lens_rows.window_rows(mc._loop.context.window, [])
  scores = np.full(len(rows), -0.9, np.float32)
  few = np.flatnonzero(rows.state == GIST)[:2]
  scores[few] = [0.3, 0.2]
  assert lensnet_policy.find_answers(view, rows, scores) == {}
  out = lensnet_policy.entry_scores(view, rows, scores)
  assert (out[rows.entry[few]] > 0.2).all()
  assert (np.delete(out, rows.entry[few]) < 0.2).all()


def meaning_policy(lm, encoder):
  """Keys to which a letter means the same in upper and in lower case."""
  config = lensnet.LensNetConfig(d_model=lm.config.d_model)
  params = lensnet.init_params(config)
  rng = np.random.RandomState(7)
  vectors = rng.randint(-127, 128, (lm.config.vocab_size, 32))
  salience = np.full((lm.config.vocab_size, 2), 0.01, np.float32)
  for letter in "abcdefghijklmnopqrstuvwxyz":
    low, high = (lm.tokenizer.encode(c)[0] for c in (letter, letter.upper()))
    vectors[high] = vectors[low]
    salience[[low, high]] = 1
  params["table"] = {"vectors": vectors.astype(np.int8), "salience": salience}
  return lensnet_policy.LensNetPolicy(config, params, lm, encoder, {})


def lines_around(fact, at, size=4000):
  """Lines of digits with a fact in place of the `at`-th character on."""
  text = "".join(f"{i:015d}\n" for i in range(size // 16))
  return text[: at - 1] + "\n" + fact + "\n" + text[at + 1 + len(fact) :]


FACT = "THE FERRY SKIPPER GROWS ROSES."


def test_what_no_word_finds_is_found_by_meaning(tiny_lm, tiny_gistnet):
  policy = meaning_policy(tiny_lm, tiny_gistnet)
  mc = opened(tiny_lm, tiny_gistnet, 4000, text=lines_around(FACT, 1300),
              policy=policy)
  view = asked_view(mc, "skipper")
  scores = policy.score(view)
  a, b = policy.sources[0]
  assert len(policy.sources) == 1 and mc.text(a, b).strip() == FACT
  coarse = view.entries.level > 0
  start = view.entries.start()
  above = np.searchsorted(start, [a, b - 1], side="right") - 1
  assert coarse[above].all() and (scores[above] > 0.5).all()
  policy.by_meaning = False
  assert (policy.score(view)[above] < 0.5).all() and not policy.sources


def test_what_words_surely_answer_is_not_looked_for_by_meaning(
  tiny_lm, tiny_gistnet, monkeypatch
):
  policy = meaning_policy(tiny_lm, tiny_gistnet)
  mc = opened(tiny_lm, tiny_gistnet, 4000, text=lines_around(FACT, 1300),
              policy=policy)
  monkeypatch.setattr(
    policy, "score_rows", lambda view, rows: np.full(len(rows), 0.9))
  looked = []
  monkeypatch.setattr(
    meaning, "find_alike", lambda *given: looked.append(1) or {})
  policy.score(asked_view(mc, "SKIPPER GROWS ROSES"))
  assert policy.sources and not looked
  other = asked_view(mc, "skipper grows roses")
  policy.score(other)
  assert len(looked) == 1 and not policy.sources  # blanks alone are no answer
  policy.score(dataclasses.replace(other, step=1))
  assert len(looked) == 1  # once for a question
  policy.score(asked_view(mc, "skipper grows roses"))
  assert len(looked) == 2


def test_the_policy_scores_what_is_there(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  policy = mc._loop._policy
  scores = policy.score(view_of(mc))
  assert len(scores) == len(mc.focus()) and np.abs(scores).max() <= 1
  assert policy.card is None
  assert 0 < policy.touched <= 256 + mc.tree.num_nodes(1)
  assert policy.bytes_read > 0


def test_beyond_the_scan_a_bounded_search_takes_over(
  tiny_lm, tiny_gistnet, monkeypatch
):
  mc = opened(tiny_lm, tiny_gistnet, 5000)
  policy = mc._loop._policy
  all_read = policy._by_keys(view_of(mc))
  monkeypatch.setattr(lensnet_policy, "_SCAN", 0)
  policy._query = None
  policy._max_nodes = 1 << 20
  assert policy._by_keys(view_of(mc)) == all_read
  policy._query, policy._max_nodes, policy.touched = None, 64, 0
  policy._by_keys(view_of(mc))
  assert policy.touched <= 64


def test_weights_are_saved_and_loaded(tiny_lm, tiny_gistnet, tmp_path):
  config = lensnet.LensNetConfig(d_model=32, width=16, heads=2)
  params = lensnet.init_params(config, seed=5)
  path = tmp_path / "lensnet.safetensors"
  lensnet_policy.save_lensnet(path, params, config, {"note": "x"})
  policy = lensnet_policy.load_lensnet(tiny_lm, tiny_gistnet, path)
  assert policy.card and policy.config == config
  same = LensKeyer(params, config, tiny_lm)
  assert policy.keyer.fingerprint == same.fingerprint
  other = lensnet.LensNetConfig(d_model=16)
  lensnet_policy.save_lensnet(path, lensnet.init_params(other), other, {})
  with pytest.raises(McjaxError, match="reads vectors of 16"):
    lensnet_policy.load_lensnet(tiny_lm, tiny_gistnet, path)


def test_the_shipped_keys_tell_what_is_alike_in_meaning(smollm2):
  """Each question is nearest to its own statement; they share no such word."""
  policy = lensnet_policy.load_lensnet(smollm2, gistnet.load_gistnet(smollm2))
  assert policy.by_meaning
  pairs = (("The physician told him to stop smoking.",
            "Which habit did the doctor say the patient must quit?"),
           ("Our neighbours bought a red convertible.",
            "What car do the people next door own?"),
           ("Rain ruined most of the wheat that summer.",
            "What spoiled the harvest on the farm?"),
           ("The plane was delayed by thick fog.",
            "Why did the flight depart late from the airport?"))
  encode = smollm2.tokenizer.encode
  asked = [encode(question) for _, question in pairs]
  keys = np.concatenate([
    policy.keyer.encode_keys(encode(said)[None]) for said, _ in pairs])
  found = [np.argmax(keys.astype(np.int32) @ policy.keyer.query(
    ids, np.ones(len(ids), np.float32))) for ids in asked]
  assert found == [0, 1, 2, 3]
