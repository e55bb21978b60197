"""Focus: is what matters in detail, and does it pay?

Four parts on held-out documents, each for every policy:

  planted  made-up facts far apart: hit@budget (the fact at L0 when the answer
           begins), answers, nodes and bytes of the search, short and long
           histories, against an embedding retriever
  labels   rank correlation of scores with the true effect of edits, and the
           regret of what the allocator makes of them
  text     NLL of natural text against a sliding window of the same budget
  shift    how the focus follows a change of topic, and the return

The parts live in focus_planted, focus_labels, focus_text and focus_shift; what
is finished stays in the folder, so that a killed run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import os

import numpy as np

from mcjax.base.load import BaseLM, load_base_lm
from mcjax.evaluation.report.writer import Report
from mcjax.evaluation.suites import (
  focus_labels,
  focus_planted,
  focus_shift,
  focus_text,
)
from mcjax.evaluation.suites.focus_bench import Bench, Settings
from mcjax.evaluation.systems import rag
from mcjax.training.common.data import TokenStore

__all__ = ["Settings", "measure", "run"]


def run(settings: Settings, folder) -> Report:
  """Measures on the held-out store and writes the report into `folder`.

  Raises:
    McjaxError: there is no such text; tools/prepare_data makes it.
  """
  lm = load_base_lm(settings.base, dtype=settings.dtype)
  stores = settings.stores(lm)
  retriever = _embedding_similarities if settings.retriever else None
  report = measure(lm, stores, settings, folder, retriever)
  report.write(folder)
  return report


@functools.cache
def _embedder() -> rag.Embedder:
  return rag.Embedder()


def _embedding_similarities(texts, questions) -> np.ndarray:
  return _embedder().encode(questions) @ _embedder().encode(texts).T


def measure(lm: BaseLM, stores: Mapping[str, TokenStore], settings: Settings,
            folder: str | os.PathLike,
            retriever: focus_planted.Retriever | None = None) -> Report:
  """Measures the parts asked for.

  Args:
    lm: the base.
    stores: held-out documents per kind.
    settings: see `Settings`.
    folder: keeps what is finished.
    retriever: texts, questions -> similarities [Q, N]; optional.

  Raises:
    McjaxError: an unknown policy, or documents that are too short.
  """
  bench = Bench(lm, stores, settings, folder)
  report = Report("focus", dataclasses.asdict(settings))
  if "planted" in settings.parts:
    focus_planted.measure(bench, report, retriever)
  for name, part in (("labels", focus_labels), ("text", focus_text),
                     ("shift", focus_shift)):
    if name in settings.parts:
      part.measure(bench, report)
  for name in settings.policies:
    if getattr(bench.policy(name), "card", {}) is None:
      report.notes.append(f"{name} is untrained.")
  return report
