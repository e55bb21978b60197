"""LensNet's rows: what it is shown of window, query and tail."""

from lens_cases import opened, view_of
import numpy as np

from mcjax.lens import features as lens_rows
from mcjax.lens.features import BURIED, GIST, MARGIN, RAW, SPAN, TAIL_GISTS
from mcjax.window.working_context import WorkingContext


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
