"""The journal: durable with the commit, undone with it, and its spans."""

import shutil

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.testing.tree_reference import create, random_ids, reopen
from mcjax.tree.journal import overlaps, wholly_inside
from mcjax.types import McjaxError


def test_events_are_durable_with_the_commit(url):
  tree = create(url)
  tree.append(random_ids(100))
  tree.journal.add("document", name="ä.md", metadata={"a": [1, None]})
  assert [e["name"] for e in tree.journal.of("document")] == ["ä.md"]
  tree.close()
  assert reopen(url).journal.events == []
  tree = reopen(url)
  tree.journal.add("document", name="b.md")
  tree.commit()
  tree.journal.add("forgotten", start=3, stop=9)
  tree.commit()
  tree = reopen(url)
  assert [e["kind"] for e in tree.journal.events] == ["document", "forgotten"]
  assert tree.journal.forgotten.tolist() == [[3, 9]]
  for i in range(300):  # over many chunks
    tree.journal.add("document", name="x" * i)
  tree.commit()
  assert len(reopen(url).journal.events) == 302


def test_a_transient_event_is_undone(url):
  tree = create(url)
  with tree.transient():
    tree.journal.add("forgotten", start=0, stop=5)
    assert len(tree.journal.forgotten) == 1
  assert tree.journal.events == [] and not len(tree.journal.forgotten)


def test_what_is_no_json_is_refused_and_changes_nothing(memory_url):
  tree = create(memory_url)
  with pytest.raises(McjaxError, match="not JSON"):
    tree.journal.add("document", metadata={"a": object()})
  assert tree.journal.events == [] and tree.journal.column.length == 0


def test_a_damaged_journal_is_told(tmp_path):
  tree = create(tmp_path / "tree")
  tree.journal.add("document", name="a")
  tree.commit()
  shutil.rmtree(tmp_path / "tree/journal")
  with pytest.raises(McjaxError, match="journal"):
    reopen(tmp_path / "tree")


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), max_size=5))
def test_spans_against_sets(pairs):
  tree = create("memory://journal-spans/" + str(abs(hash(tuple(pairs)))))
  gone = set()
  for start, count in pairs:
    tree.journal.add("forgotten", start=start, stop=start + count)
    gone |= set(range(start, start + count))
  spans = tree.journal.forgotten
  start = np.arange(130)
  for width in (1, 7):
    expected = [bool(gone & set(range(a, a + width))) for a in start]
    assert overlaps(spans, start, start + width).tolist() == expected
  inside = wholly_inside(spans, 1, 1, 4)
  assert inside.tolist() == [
    set(range(32 * i, 32 * i + 32)) <= gone for i in (1, 2, 3)]
