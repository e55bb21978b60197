"""Settings of a run: dataclasses from plain values, checked field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import types
import typing
from typing import Any

from mcjax.types import McjaxError

_KINDS = {bool: "True or False", int: "a whole number", float: "a number",
          str: "a string", tuple: "a tuple"}


def read_fields(kind, name: str, values: Mapping[str, Any]):
  """A dataclass `kind` of `values`, which stand in `config.<name>`.

  Args:
    kind: the dataclass.
    name: where in the configuration the values stand; "" at its top.
    values: by field; what is left out keeps its default.

  Raises:
    McjaxError: names an unknown field and the nearest known one, or a value of
      another kind than the field has.
  """
  place = f"config.{name}" if name else "config"
  known = [f.name for f in dataclasses.fields(kind)]
  check_names(place, values, known)
  hints = typing.get_type_hints(kind)
  return kind(**{field: _read(f"{place}.{field}", values[field], hints[field])
                 for field in known if field in values})


def check_names(place: str, names: Iterable[str], known: Iterable[str]) -> None:
  """Refuses the first of `names` that is not among the `known` of a place.

  Raises:
    McjaxError: with the nearest known name, or all of them.
  """
  known = sorted(known)
  for name in sorted(set(names) - set(known)):
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = (f"did you mean {place}.{near[0]}?" if near else
            "known are " + ", ".join(known))
    raise McjaxError(f"{place}.{name} is not a setting; {hint}")


def plain_type(hint) -> type:
  """The type behind an annotation: without "| None", tuple of tuple[int, …]."""
  options = [t for t in typing.get_args(hint) if t is not type(None)]
  if isinstance(hint, types.UnionType) and len(options) == 1:
    hint = options[0]
  return typing.get_origin(hint) or hint


def _read(place: str, value, hint):
  """`value` in the type that the annotation asks for."""
  kind = plain_type(hint)
  if value is None and isinstance(hint, types.UnionType):
    return None
  if kind is tuple and isinstance(value, (tuple, list)):
    return _read_items(place, value, typing.get_args(hint))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  right = isinstance(value, kind) if kind in _KINDS else True
  if not right or (kind is int and isinstance(value, bool)):
    raise McjaxError(f"{place} must be {_KINDS[kind]}, got {value!r}")
  return value


def _read_items(place: str, values, hints) -> tuple:
  if not hints or hints[-1] is Ellipsis:
    hints = [hints[0] if hints else typing.Any] * len(values)
  if len(hints) != len(values):
    raise McjaxError(f"{place} must have {len(hints)} items, got {values!r}")
  return tuple(_read(f"{place}[{i}]", value, hint)
               for i, (value, hint) in enumerate(zip(values, hints)))
