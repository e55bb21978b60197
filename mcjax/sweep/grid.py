"""The cells of a grid: which settings are tried together."""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import itertools
import re
from typing import NamedTuple

from mcjax.types import McjaxError

_LONGEST = 100  # characters of a folder's name
_OPEN, _CLOSE = "([{", ")]}"


class Cell(NamedTuple):
  """One setting of the grid.

  Attributes:
    values: by the name of a setting, as text.
  """

  values: dict[str, str]

  @property
  def name(self) -> str:
    """A name for a folder, unlike that of every other cell."""
    plain = ",".join(f"{k}={v}" for k, v in self.values.items())
    name = re.sub(r"[^\w.=,+-]", "_", plain)[:_LONGEST]
    if name == plain:
      return name
    digest = hashlib.blake2b(plain.encode(), digest_size=4)
    return f"{name}-{digest.hexdigest()}"

  @property
  def overrides(self) -> list[str]:
    """Arguments for a main that takes --config."""
    return [f"--config.{k}={v}" for k, v in self.values.items()]


def cells(axes: Sequence[str]) -> list[Cell]:
  """Every combination of the axes, the last one changing fastest.

  Args:
    axes: "name=value,value" each; a comma within brackets or quotes parts
      nothing, so a tuple is given as (1,2).

  Raises:
    McjaxError: an axis without values, or two of one name.
  """
  read: dict[str, list[str]] = {}
  for axis in axes:
    name, equals, text = axis.partition("=")
    values = [v for v in _parts(text) if v]
    if not (name and equals and values):
      raise McjaxError(f"--grid={axis}: want name=value,value")
    if name in read:
      raise McjaxError(f"--grid={axis}: {name} is there twice")
    read[name] = list(dict.fromkeys(values))
  return [Cell(dict(zip(read, values)))
          for values in itertools.product(*read.values())]


def shard(every: Sequence[Cell], text: str) -> list[Cell]:
  """The part i of n of the cells; all if `text` is empty.

  Raises:
    McjaxError: not "i/n" with 0 <= i < n.
  """
  if not text:
    return list(every)
  found = re.fullmatch(r"(\d+)/(\d+)", text)
  if not found or int(found[1]) >= int(found[2]):
    raise McjaxError(f"--shard={text}: want i/n with i from 0 to n-1")
  return list(every)[int(found[1]) :: int(found[2])]


def _parts(text: str) -> list[str]:
  """Parted at the commas that stand in no brackets and no quotes."""
  parts, depth, quote = [""], 0, ""
  for c in text:
    if c == "," and not depth and not quote:
      parts.append("")
      continue
    if quote:
      quote = "" if c == quote else quote
    elif c in "'\"":
      quote = c
    depth += (c in _OPEN) - (c in _CLOSE)
    parts[-1] += c
  return parts
