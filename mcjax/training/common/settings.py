"""Settings of a run, from plain values."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from mcjax.types import McjaxError


def read_fields(kind, name: str, values: Mapping[str, Any]):
  """A dataclass `kind` of `values`, which stand in `config.<name>`.

  Raises:
    McjaxError: names an unknown field, with the known ones.
  """
  known = [f.name for f in dataclasses.fields(kind)]
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise McjaxError(f"config.{name}.{unknown[0]} is not a setting; known are "
                     + ", ".join(known))
  return kind(**values)
