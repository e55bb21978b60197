"""Where a tree can live."""

import pytest

from mcjax.tree.places import locate
from mcjax.types import McjaxError

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}


def test_an_object_store_by_its_url():
  place = locate(
    "s3://box/a/b?endpoint=http://host:9000&region=eu-1", KEYS)
  assert place.url == "s3://box/a/b/?endpoint=http://host:9000&region=eu-1"
  assert place.folder is None and place.spec == {
    "driver": "s3", "bucket": "box", "path": "a/b/", "aws_region": "eu-1",
    "endpoint": "http://host:9000",
    "aws_credentials": {"type": "environment"}}
  assert locate(place.url, KEYS) == place


@pytest.mark.parametrize("environment, expected", [
  ({}, {"aws_credentials": {"type": "default"}}),
  ({"AWS_PROFILE": "me", "AWS_DEFAULT_REGION": "r"},
   {"aws_credentials": {"type": "profile", "profile": "me"},
    "aws_region": "r"}),
  ({"AWS_ENDPOINT_URL": "http://h", "AWS_ENDPOINT_URL_S3": "https://s"} | KEYS,
   {"aws_credentials": {"type": "environment"}, "endpoint": "https://s",
    "aws_region": "us-east-1"}),
])
def test_an_object_store_by_the_environment(environment, expected):
  place = locate("s3://box/a", environment)
  assert place.spec == {
    "driver": "s3", "bucket": "box", "path": "a/", **expected}


@pytest.mark.parametrize("query, credentials", [
  ("anonymous=true", {"type": "anonymous"}),
  ("profile=you", {"type": "profile", "profile": "you"}),
])
def test_credentials_by_the_url(query, credentials):
  assert locate(f"s3://b/a?{query}", KEYS).spec["aws_credentials"] == (
    credentials)


@pytest.mark.parametrize("url, said", [
  ("s3://b/a?endpont=http://h", "'endpont' is not one of anonymous, endpoint"),
  ("s3://b/a?endpoint=h:9000", "endpoint 'h:9000' is no"),
  ("s3://b/a?region", "region"),
  ("s3:///a", "names no bucket"),
  ("ftp://b/a", "use a path"),
])
def test_urls_that_are_refused(url, said):
  with pytest.raises(McjaxError, match=said):
    locate(url, {})


def test_paths_and_other_urls(tmp_path):
  place = locate(tmp_path / "t")
  assert locate(f"file://{tmp_path}/t") == place
  assert place.folder == tmp_path / "t"
  assert locate("gs://b/a").spec == "gs://b/a/"
