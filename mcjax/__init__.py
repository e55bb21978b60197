"""mcjax: a frozen language model with unbounded memory at constant cost.

The names below load with their first use, so that `import mcjax` costs next to
nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from mcjax.base.from_transformers import from_transformers
  from mcjax.base.load import BaseLM, load_base_lm
  from mcjax.config import Config
  from mcjax.gist.encoder import load_gistnet
  from mcjax.lens.policy import load_lensnet
  from mcjax.runtime.documents import Document, Source
  from mcjax.runtime.engine import Engine
  from mcjax.runtime.megacontext import MegaContext
  from mcjax.runtime.results import Generation, IngestStats
  from mcjax.types import Entry, McjaxError

__version__ = "0.1.0"

_HOMES = {
  "BaseLM": "base.load",
  "Config": "config",
  "Document": "runtime.documents",
  "Engine": "runtime.engine",
  "Entry": "types",
  "Generation": "runtime.results",
  "IngestStats": "runtime.results",
  "McjaxError": "types",
  "MegaContext": "runtime.megacontext",
  "Source": "runtime.documents",
  "from_transformers": "base.from_transformers",
  "load_base_lm": "base.load",
  "load_gistnet": "gist.encoder",
  "load_lensnet": "lens.policy",
}

__all__ = [
  "BaseLM",
  "Config",
  "Document",
  "Engine",
  "Entry",
  "Generation",
  "IngestStats",
  "McjaxError",
  "MegaContext",
  "Source",
  "from_transformers",
  "load_base_lm",
  "load_gistnet",
  "load_lensnet",
]


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module 'mcjax' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"mcjax.{_HOMES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
