"""The evaluations by name, each with settings of its own."""

from __future__ import annotations

from collections.abc import Mapping
import importlib
from typing import Any

from mcjax.evaluation.report.writer import Report
from mcjax.settings import check_names, read_fields

NAMES = ("overhead", "ttft", "ingest", "drift", "substitution", "ceiling",
         "visible", "focus", "questions", "needle",
         "perplexity", "session")


def settings(name: str):
  """The `Settings` of a suite, a frozen dataclass with a `quick` method.

  Raises:
    McjaxError: there is no such suite.
  """
  return _suite(name).Settings


def run(name: str, values: Mapping[str, Any], folder) -> Report:
  """Runs a suite and writes its report into `folder`.

  Args:
    name: one of NAMES.
    values: fields of its `Settings`; the others keep their defaults.
    folder: made if need be.

  Raises:
    McjaxError: an unknown suite or setting, or a value of the wrong kind.
  """
  suite = _suite(name)
  return suite.run(read_fields(suite.Settings, "", values), folder)


def _suite(name: str):
  check_names("config.suite", [name], NAMES)
  return importlib.import_module(f"mcjax.evaluation.suites.{name}")
