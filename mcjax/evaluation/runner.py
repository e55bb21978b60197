"""The evaluations by name, and their settings from the command line."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import importlib

from mcjax.evaluation.report.writer import Report
from mcjax.types import McjaxError

NAMES = ("overhead", "ttft", "ingest", "drift", "substitution", "ceiling",
         "visible", "focus")


def run(name: str, folder, *, quick: bool = False,
        changes: Sequence[str] = ()) -> Report:
  """Runs a suite and writes its report into `folder`.

  Args:
    name: one of NAMES.
    folder: made if need be.
    quick: start from the small settings.
    changes: settings as "name=value", the items of a list joined by colons.

  Raises:
    McjaxError: an unknown suite or setting, or a value of the wrong kind.
  """
  if name not in NAMES:
    raise McjaxError(f"no suite {name!r}; known: {', '.join(NAMES)}")
  suite = importlib.import_module(f"mcjax.evaluation.suites.{name}")
  defaults = suite.Settings.quick() if quick else suite.Settings()
  return suite.run(changed(defaults, changes), folder)


def changed(settings, changes: Sequence[str]):
  """Settings with "name=value" changes applied, in the type they have."""
  values = {}
  for change in changes:
    field, equals, text = change.partition("=")
    if not equals or not hasattr(settings, field):
      known = ", ".join(f.name for f in dataclasses.fields(settings))
      raise McjaxError(f"--set={change}: want name=value, name one of {known}")
    values[field] = _parsed(field, text, getattr(settings, field))
  return dataclasses.replace(settings, **values)


def _parsed(field: str, text: str, old):
  try:
    if isinstance(old, bool):
      return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(old, tuple):
      kind = type(old[0]) if old else str
      return tuple(kind(item) for item in text.split(":") if item)
    return type(old)(text)
  except (ValueError, KeyError):
    kind = type(old).__name__
    raise McjaxError(f"--set={field}={text}: not a value of {kind}") from None
