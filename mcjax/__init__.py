"""mcjax: a frozen language model with unbounded memory at constant cost."""

from mcjax.base.load import BaseLM, load_base_lm
from mcjax.config import Config
from mcjax.gistnet import load_gistnet
from mcjax.runtime import Generation, IngestStats, MegaContext
from mcjax.types import Entry, McjaxError

__version__ = "0.1.0"

__all__ = [
  "BaseLM",
  "Config",
  "Entry",
  "Generation",
  "IngestStats",
  "McjaxError",
  "MegaContext",
  "load_base_lm",
  "load_gistnet",
]
