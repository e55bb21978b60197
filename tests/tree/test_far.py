"""A history of more than 2**31 tokens, by a record that says so."""

import numpy as np
import pytest

from mcjax.testing.tree_reference import (
  TinyEncoder,
  create,
  peek,
  random_ids,
  reference_gists,
  round_trip,
)
from mcjax.tree import format as tree_format
from mcjax.tree import lexical_keys
from mcjax.tree.columns import Column, flush_columns
from mcjax.tree.counts import AccessCounts
from mcjax.tree.store import (
  ArraySpec,
  Store,
  decode_record,
  encode_record,
)
from mcjax.types import span_width

FAR = 2**31 + 2**25  # a multiple of 32**5, so that no parent is half done
NEW = 2**15 + 700  # completes nodes of three levels


@pytest.fixture(scope="module")
def far_tree(tmp_path_factory):
  """A tree whose columns hold their newest chunk alone."""
  url = tmp_path_factory.mktemp("far") / "t"
  create(url).close()
  store = Store(url)
  raw, generation = store.read_record()
  record = decode_record(raw, store.url)
  record |= {"version": 1, "cursor": FAR}
  record["frequency"] = {"slot": 0, "blocks": FAR // 32}
  del record["sums"]
  vocab = record["vocab_size"]
  counts = store.array("frequency", ArraySpec("uint32", vocab, 1, 1), True)
  counts[0].write(np.zeros(vocab, np.uint32)).result()

  def hold_the_newest(path, spec, length):
    column = Column(store, path, spec, 0)
    column.length = column.flushed = length - spec.chunk
    rows = np.zeros((spec.chunk, *spec.row_shape), spec.numpy_dtype)
    column.append(rows)
    flush_columns([column], store.url, everything=True)

  hold_the_newest("tokens", tree_format.tokens_spec(vocab), FAR)
  level = 1
  while nodes := FAR // span_width(level):
    for kind in ("gists", "keys") if level > 1 else ("gists",):
      spec = tree_format.column_spec(kind, level, record)
      folder = tree_format.folder(kind, record)
      nodes = -(-nodes // spec.chunk) * spec.chunk
      hold_the_newest(f"{folder}/L{level}", spec, nodes)
    level += 1
  store.write_record(encode_record(record), generation)
  return url


def test_it_reads_and_grows_at_its_far_end(far_tree):
  tree, ids, encoder = peek(far_tree), random_ids(NEW), TinyEncoder()
  assert tree.cursor == FAR and tree.top_level == 6
  gists = reference_gists(encoder, ids, round_trip("bfloat16"))
  with tree.transient():
    tree.append(ids)
    np.testing.assert_array_equal(tree.tokens(FAR, FAR + NEW), ids)
    assert not tree.tokens(FAR - 9, FAR).any()
    for level, rows in enumerate(gists, 1):
      first = FAR // span_width(level)
      assert tree.num_nodes(level) == first + len(rows)
      np.testing.assert_array_equal(
        tree.gists(level, first, first + len(rows)), rows)
    first, before = FAR // 32**2, np.zeros(lexical_keys.LOOKBACK, np.int64)
    span = np.concatenate([before, ids[: 32**2]])[None]
    np.testing.assert_array_equal(
      tree.keys(2, first, first + 1), lexical_keys.sketch(span, 2))
  assert tree.cursor == FAR


def test_accesses_at_its_far_end_are_counted(far_tree):
  counts, index = AccessCounts(Store(far_tree)), np.array([FAR - 1])
  counts.add(np.array([0]), index)
  counts.flush(lambda level: FAR)
  again = AccessCounts(Store(far_tree))
  assert again.read(0, FAR - 2, FAR).tolist() == [0, 1]
