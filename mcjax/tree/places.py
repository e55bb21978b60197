"""Where a tree can live: paths and urls, credentials, time limits.

An object store is given as `s3://bucket/folder` or `gs://bucket/folder`. What
else it needs stands behind the url or in the environment:

s3://bucket/folder?endpoint=http://host:9000&region=eu-1&profile=me
  endpoint   of MinIO and the like; else $AWS_ENDPOINT_URL_S3,
             $AWS_ENDPOINT_URL, or Amazon's
  region     else $AWS_REGION, $AWS_DEFAULT_REGION, or what the bucket says
  profile    of ~/.aws/credentials; else $AWS_ACCESS_KEY_ID and
             $AWS_SECRET_ACCESS_KEY, or $AWS_PROFILE, or Amazon's usual chain
  anonymous  =true sends no credentials

Credentials never stand in a url, since messages show it. Google's are those
that its command line leaves, or $GOOGLE_APPLICATION_CREDENTIALS.
"""

from __future__ import annotations

from collections.abc import Mapping
import os
import pathlib
import re
from typing import Any, NamedTuple
import unicodedata
import urllib.parse

from mcjax.types import McjaxError

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
_UNTOLD = ("Cc", "Cs", "Zl", "Zp")  # control, halves of characters, line ends
_S3_SETTINGS = {"endpoint", "region", "profile", "anonymous"}
# A server that is not there or says nothing is given up after half a minute:
# six attempts of at most four seconds, and what is waited between them.
_RETRIES = {"max_retries": 5, "initial_delay": "200ms", "max_delay": "1s"}
RETRIES = {"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES}
_TIME_LIMITS = {
  "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "4",
  "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "4",
  "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}


class Place(NamedTuple):
  """A folder for a tree.

  Attributes:
    url: as given, in one form; for messages, and to open it again.
    folder: of local files; else None.
    spec: of the key-value store, for TensorStore.
  """

  url: str
  folder: pathlib.Path | None
  spec: str | dict[str, Any]


def locate(url: str | os.PathLike[str],
           environment: Mapping[str, str] = os.environ) -> Place:
  """Reads a path or a url. Raises: McjaxError."""
  text = _text(url)
  if text.startswith("file://"):
    text = text[len("file://") :]
  elif text.startswith("s3://"):
    return _s3(text, environment)
  elif text.startswith(("memory://", "gs://")):
    scheme, _, rest = text.partition("://")
    if scheme == "gs" and not rest.strip("/"):
      raise McjaxError(f"{text} names no bucket: gs://bucket/folder")
    text = f"{scheme}://{rest.rstrip('/')}/"
    return Place(text, None, text)
  elif _URL.match(text):
    raise McjaxError(
      f"cannot store a tree at {text}: use a path, file://, memory://, gs://"
      " or s3://"
    )
  if not text:
    raise McjaxError("cannot store a tree at an empty path")
  folder = pathlib.Path(os.path.abspath(text))
  spec = {"driver": "file", "path": f"{folder}/"}
  return Place(str(folder), folder, spec)


def _text(url: str | os.PathLike[str]) -> str:
  """The url as text that messages can show. Raises: McjaxError."""
  try:
    text = os.fsdecode(url)
  except TypeError as error:
    raise McjaxError(
      f"where a tree lies is a path or a url, not {url!r:.99}") from error
  if any(unicodedata.category(c) in _UNTOLD for c in text):
    raise McjaxError(
      f"cannot store a tree at {text!a}: control characters, or no UTF-8")
  return text


def _s3(text: str, environment: Mapping[str, str]) -> Place:
  parts = urllib.parse.urlsplit(text)
  try:
    given = dict(urllib.parse.parse_qsl(
      parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
  except ValueError as error:
    raise McjaxError(f"{text}: {error}") from None
  if unknown := sorted(given.keys() - _S3_SETTINGS):
    raise McjaxError(
      f"{text}: {unknown[0]!r} is not one of {', '.join(sorted(_S3_SETTINGS))}"
    )
  if not parts.netloc:
    raise McjaxError(f"{text} names no bucket: s3://bucket/folder")
  path = parts.path.strip("/") + "/"
  spec: dict[str, Any] = {
    "driver": "s3", "bucket": parts.netloc, "path": path.lstrip("/"),
    "aws_credentials": _s3_credentials(given, environment)}
  endpoint = (given.get("endpoint") or environment.get("AWS_ENDPOINT_URL_S3")
              or environment.get("AWS_ENDPOINT_URL"))
  region = (given.get("region") or environment.get("AWS_REGION")
            or environment.get("AWS_DEFAULT_REGION"))
  if endpoint:
    if not re.match(r"https?://[^/]", endpoint):
      raise McjaxError(f"{text}: endpoint {endpoint!r} is no http(s) address")
    spec["endpoint"] = endpoint
    region = region or "us-east-1"  # what servers beside Amazon's expect
  if region:
    spec["aws_region"] = region
  query = f"?{parts.query}" if parts.query else ""
  return Place(f"s3://{parts.netloc}/{path.lstrip('/')}{query}", None, spec)


def _s3_credentials(given: Mapping[str, str], environment: Mapping[str, str]
                    ) -> dict[str, str]:
  if given.get("anonymous", "false") == "true":
    return {"type": "anonymous"}
  if profile := given.get("profile"):
    return {"type": "profile", "profile": profile}
  if "AWS_ACCESS_KEY_ID" in environment:
    return {"type": "environment"}
  if profile := environment.get("AWS_PROFILE"):
    return {"type": "profile", "profile": profile}
  return {"type": "default"}


def limit_time() -> None:
  """Sets TensorStore's time limits for servers, where the user set none.

  Where there are no files of Amazon's command line it is told so, lest its
  library writes to the terminal that it did not find them.
  """
  for name, value in _TIME_LIMITS.items():
    os.environ.setdefault(name, value)
  home = pathlib.Path("~/.aws").expanduser()
  for name, file in (("AWS_CONFIG_FILE", "config"),
                     ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
    if not (home / file).exists():
      os.environ.setdefault(name, os.devnull)
