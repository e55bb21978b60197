"""Ingest into a tree against indexing the same text with an embedding model.

Both start from text and end with something that can be searched: the tree with
tokens, gists and keys on disk, committed; and RAG's chunk vectors in memory,
with the embedder in its best case (full batches of full chunks, no padding).
Tokens are the base model's for both.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from typing import Any

from mcjax.config import Config
from mcjax.evaluation.data import texts
from mcjax.evaluation.report import writer as report
from mcjax.evaluation.report.writer import Report, Table, median, progress
from mcjax.evaluation.systems import rag
from mcjax.evaluation.systems.models import Models, ModelSettings
from mcjax.gist import encoder as gistnet


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
  """Sizes.

  Attributes:
    window: of the working context, which ingest retiles at its end.
    tokens: ingested per repeat.
    rag_tokens: indexed per repeat; fewer, as it is slow.
    repeats: interleaved repeats.
    batches: batch sizes of the embedder; the best counts.
    text: files; the standard library if empty.
  """

  window: int = 1024
  tokens: int = 131072
  rag_tokens: int = 32768
  repeats: int = 5
  batches: tuple[int, ...] = (8, 32)
  text: tuple[str, ...] = ()

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      window=512, tokens=8192, rag_tokens=2048, repeats=2,
      batches=(8,))
    return cls(**{**small, **changes})


def run(settings: Settings, folder) -> Report:
  """Measures both and writes the report into `folder`."""
  folder = report.make_folder(folder)
  models = settings.load()
  lm, encoder, _ = models
  ours = texts.text(lm.tokenizer, settings.tokens, settings.text)
  theirs = texts.text(lm.tokenizer, settings.rag_tokens, settings.text)
  known = len(lm.tokenizer.encode(theirs))
  embedders = {b: rag.Embedder(batch=b) for b in settings.batches}
  tree_seconds, phases, forwarded = [], {}, 0
  index_seconds = {b: [] for b in embedders}
  for repeat in range(-1, settings.repeats):  # the first one compiles
    progress(f"ingest: repeat {repeat + 1} of {settings.repeats}")
    seconds, phases, forwarded = _ingest(
      models, Config(window=settings.window), folder / "tree", ours
    )
    for batch, embedder in embedders.items():
      begin = time.perf_counter()
      rag.Index(embedder, theirs)
      if repeat >= 0:
        index_seconds[batch].append((time.perf_counter() - begin) / known)
    if repeat >= 0:
      tree_seconds.append(seconds)
  best = min(index_seconds, key=lambda b: median(index_seconds[b]))
  out = Report("ingest", dataclasses.asdict(settings))
  rate, rag_rate = 1 / median(tree_seconds), 1 / median(index_seconds[best])
  ratio = report.ratio_median(index_seconds[best], tree_seconds)
  out.add("tree: ingest rate", rate, "tokens/s")
  out.add("RAG: index rate", rag_rate, "tokens/s")
  out.add("ingest relative to RAG index", ratio, "ratio")
  flops = gistnet.flops_per_token(encoder.config, lm.config)
  bert = _bert_flops(embedders[best])
  out.add("GistNet: FLOPs per token", flops, "FLOP")
  out.add(f"{rag.MODEL}: FLOPs per word piece", bert, "FLOP")
  out.add("tree: tokens forwarded", forwarded, "tokens")
  for name, share in phases.items():
    out.add(f"tree: share of {name}", share, "ratio")
  out.tables.append(Table(
    "Tokens of the base model per second, from text to searchable",
    ("what", "tokens/s", "MFLOP/token", "ratio"),
    [["MegaContext tree on disk", rate, flops / 1e6, ratio],
     [f"RAG index, {rag.MODEL}, batch {best}", rag_rate, bert / 1e6, 1.0]],
  ))
  out.notes.append(f"The tree took {forwarded:,} token-forwards of the base.")
  out.write(folder)
  return out


def _ingest(models: Models, config: Config, place, text: str
            ) -> tuple[float, dict[str, float], int]:
  """Seconds per token into a fresh tree, its parts' shares, tokens run."""
  if place.exists():
    shutil.rmtree(place)
  with models.create(str(place), config) as mc:
    begin = time.perf_counter()
    stats = mc.ingest(text)
    seconds = time.perf_counter() - begin
    gist = mc.telemetry.seconds["gist"]
    forwarded = mc._loop.context.tokens_run
  shutil.rmtree(place)
  begin = time.perf_counter()
  models.lm.tokenizer.encode(text)
  tokenise = time.perf_counter() - begin
  shares = {"tokenising": tokenise / seconds,
            "gists, keys and storage": gist / seconds}
  return seconds / stats.tokens, shares, forwarded


def _bert_flops(embedder: rag.Embedder) -> int:
  """FLOPs per word piece of a full chunk."""
  weights = sum(a[0].size for a in embedder.params["layers"].values()
                if a[0].ndim == 3)
  d = embedder.params["words"].shape[1]
  attention = 2 * embedder.config.layers * rag.MAX_TOKENS * d
  return int(2 * (weights + attention))
