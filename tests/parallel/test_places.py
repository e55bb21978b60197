"""Places of runs: paths, file:// and gs://, and what is refused."""

import numpy as np
import pytest

from mcjax.parallel import places
from mcjax.types import McjaxError


def test_a_local_place_is_a_full_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(places.place("run")) == str(tmp_path / "run")
  assert str(places.place(f"file://{tmp_path}/run")) == str(tmp_path / "run")
  assert places.local("run") == tmp_path / "run"


def test_a_bucket_is_no_local_path():
  found = places.place("gs://bucket/run") / "metrics.jsonl"
  assert str(found) == "gs://bucket/run/metrics.jsonl"
  assert places.is_remote(found)
  assert str(places.place(found)) == str(found)
  with pytest.raises(McjaxError, match="give a folder of this machine"):
    places.local("gs://bucket/run")


@pytest.mark.parametrize("where", ["s3://bucket/run", "memory://run"])
def test_other_places_are_refused(where):
  with pytest.raises(McjaxError, match="under a path or gs://"):
    places.place(where)


def test_a_missing_client_is_named(monkeypatch):
  monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(McjaxError, match=r"pip install 'mcjax\[gcs\]'"):
    places.place("gs://bucket/run")


def test_arrays_come_back_whole(tmp_path):
  path = places.place(tmp_path / "new" / "arrays.npz")
  places.save_arrays(path, a=np.arange(3), b=np.eye(2))
  found = places.load_arrays(path)
  np.testing.assert_array_equal(found["a"], np.arange(3))
  assert [p.name for p in path.parent.iterdir()] == ["arrays.npz"]
  places.save_array(path.with_suffix(".npy"), np.eye(3))
  np.testing.assert_array_equal(
    places.load_array(path.with_suffix(".npy")), np.eye(3))
