"""Configurations of the evaluations, one a suite."""

import ml_collections

from mcjax.cli import configs
from mcjax.evaluation import runner
from mcjax.types import McjaxError


def suite(name: str, size: str = "") -> ml_collections.ConfigDict:
  """The settings of a suite, all of them; `size` is "" or "quick".

  Raises:
    McjaxError: an unknown size.
  """
  if size not in ("", "quick"):
    raise McjaxError(f"no size {size!r} of {name}: there are :quick and, "
                     "without an argument, the full one")
  kind = runner.settings(name)
  c = configs.defaults(kind.quick() if size else kind)
  c.suite = name
  return c
