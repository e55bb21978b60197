"""Time to the first token: a document of N tokens, then a question.

Against MegaContext stand what a user would run instead: full attention on the
same base (where N fits its positions), in PyTorch transformers and in llama.cpp
too, a sliding window of the newest W tokens, and RAG with a real embedding
model that fills the same W. Everything is compiled before the clock starts;
files are written and read.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from mcjax.config import Config
from mcjax.evaluation.data import texts
from mcjax.evaluation.report import writer as report
from mcjax.evaluation.report.writer import Report, Table, median, progress
from mcjax.evaluation.systems import baselines, rag
from mcjax.evaluation.systems.llama_cpp import LlamaCpp
from mcjax.evaluation.systems.models import Models, ModelSettings
from mcjax.runtime.megacontext import MegaContext
from mcjax.types import McjaxError

_QUESTION = "Which function of the modules above parses a date, and how?"
# The standard library's first file, within every length, answers this one.
_ANSWERED = (
  "Which argument of the builtin function compile() takes the CompilerFlag of "
  "a feature?"
)
_FROM_TREE = "MegaContext, from its tree"
_TORCH, _LLAMA = "PyTorch transformers", "llama.cpp"


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
  """Sizes.

  Attributes:
    window: W, for MegaContext, the sliding window and RAG alike.
    lengths: N.
    repeats: interleaved repeats.
    full_limit: longest N for full attention; the base's positions bound it.
    torch_limit: longest N for PyTorch; 0 leaves it out.
    llama_limit: longest N for llama.cpp on the same GGUF file; 0 leaves it out.
    slow_repeats: of PyTorch and llama.cpp, which read all N tokens each time.
    rag_limit: longest N whose index is timed; it is linear in N.
    text: files; the standard library if empty.
  """

  window: int = 1024
  lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
  repeats: int = 5
  full_limit: int = 8192
  torch_limit: int = 8192
  llama_limit: int = 8192
  slow_repeats: int = 1
  rag_limit: int = 8192
  text: tuple[str, ...] = ()

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      window=512, lengths=(1024, 2048), repeats=2,
      full_limit=1024, torch_limit=0,
      llama_limit=0, rag_limit=1024)
    return cls(**{**small, **changes})


class Contestants:
  """Every way to the first token; each call returns seconds.

  Attributes:
    forwarded: tokens that the base ran on in the last call.
  """

  def __init__(self, settings: Settings, models: Models,
               folder: pathlib.Path):
    self.settings, self._models, self._folder = settings, models, folder
    self.lm = lm = models.lm
    self._config = Config(window=settings.window)
    self._prompt = self._prompt_ids()
    self._embedder = rag.Embedder()
    self._peers: dict[str, Any] = {}
    self._indices: dict[int, rag.Index] = {}
    self.forwarded = 0
    longest = max(settings.lengths)
    ids = texts.tokens(lm.tokenizer, longest, settings.text)
    self._texts = {
      n: lm.tokenizer.decode(ids[:n].tolist()) for n in settings.lengths
    }

  def _prompt_ids(self) -> np.ndarray:
    tokenizer = self.lm.tokenizer
    if tokenizer.has_chat_template:
      return tokenizer.chat_turn(_QUESTION, first=False)[0]
    return tokenizer.encode(_QUESTION)

  def arms(self, n: int) -> dict[str, Callable[[int], float]]:
    """Name to measurement, for documents of n tokens."""
    s = self.settings
    out: dict[str, Callable[[int], float]] = {}
    whole = {"full attention": (s.full_limit, self.full)} | {
      name: (limit, functools.partial(self.peer, name))
      for name, limit in ((_TORCH, s.torch_limit), (_LLAMA, s.llama_limit))}
    for name, (limit, arm) in whole.items():
      if n <= min(limit, self.lm.config.max_positions):
        out[name] = arm
    out["sliding window"] = self.sliding
    if n <= s.rag_limit:
      out["RAG, from text"] = self.rag_from_text
      out["RAG, from its index"] = self.rag_from_index
    out["MegaContext, from text"] = self.from_text
    out[_FROM_TREE] = self.from_tree
    out[f"{_FROM_TREE}, asked what the text answers"] = self.from_tree_answered
    return out

  def _ids(self, n: int) -> np.ndarray:
    ids = self.lm.tokenizer.encode(self._texts[n])
    return np.concatenate([ids[: n - len(self._prompt)], self._prompt])

  def _first_token(self, ids: np.ndarray) -> None:
    self.forwarded = len(ids)
    chunk = baselines.CHUNK
    size = -(-len(ids) // chunk) * chunk
    dtype = self.lm.params["embed"].dtype
    cache = baselines.empty_cache(self.lm.config, size, dtype)
    _, logits = baselines.prefill(self.lm, ids, cache)
    int(np.argmax(np.asarray(logits)))

  def full(self, n: int) -> float:
    """Tokenise, run every token with full attention."""
    begin = time.perf_counter()
    self._first_token(self._ids(n))
    return time.perf_counter() - begin

  def peer(self, name: str, n: int) -> float:
    """The same in another program."""
    if name not in self._peers:
      self._peers[name] = self._load_peer(name)
      self._peers[name].prefill(self._ids(n)[:64])
    begin = time.perf_counter()
    ids = self._ids(n)
    self._peers[name].prefill(ids)
    self.forwarded = len(ids)
    return time.perf_counter() - begin

  def _load_peer(self, name: str):
    if name == _TORCH:
      return baselines.TorchDecoder(self.lm)
    context = max(n for n in self.settings.lengths
                  if n <= self.settings.llama_limit)
    return LlamaCpp(self.settings.base, context)

  def sliding(self, n: int) -> float:
    """The newest W tokens only."""
    begin = time.perf_counter()
    self._first_token(self._ids(n)[-self.settings.window :])
    return time.perf_counter() - begin

  def rag_from_text(self, n: int) -> float:
    """Index, search, then read what was found."""
    begin = time.perf_counter()
    self._indices[n] = rag.Index(self._embedder, self._texts[n])
    self._read_found(n)
    return time.perf_counter() - begin

  def rag_from_index(self, n: int) -> float:
    """Search and read."""
    if n not in self._indices:
      self._indices[n] = rag.Index(self._embedder, self._texts[n])
    begin = time.perf_counter()
    self._read_found(n)
    return time.perf_counter() - begin

  def _read_found(self, n: int) -> None:
    room = self.settings.window - len(self._prompt)
    parts: list[np.ndarray] = []
    for chunk in self._indices[n].search(_QUESTION, self.settings.window // 64):
      ids = self.lm.tokenizer.encode(chunk)[: room - sum(map(len, parts))]
      parts.append(ids)
    self._first_token(np.concatenate([*reversed(parts), self._prompt]))

  def from_text(self, n: int) -> float:
    """Create a tree on disk, ingest, settle, read the window."""
    place = self._folder / "fresh"
    shutil.rmtree(place, ignore_errors=True)
    begin = time.perf_counter()
    mc = self._models.create(str(place), self._config)
    mc.ingest(self._texts[n])
    seconds = _answer(mc) - begin
    self.forwarded = mc.telemetry.counters["lm_tokens"]
    mc.close()
    shutil.rmtree(place)
    return seconds

  def from_tree_answered(self, n: int) -> float:
    """The same with a question that one place of the text answers."""
    return self.from_tree(n, _ANSWERED)

  def from_tree(self, n: int, question: str = _QUESTION) -> float:
    """Open a tree that was closed, settle, read the window."""
    kept, place = self._folder / f"tree-{n}", self._folder / "opened"
    if not kept.exists():
      mc = self._models.create(str(kept), self._config)
      mc.ingest(self._texts[n])
      mc.close()
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kept, place)
    begin = time.perf_counter()
    mc = self._models.open(str(place), self._config)
    seconds = _answer(mc, question) - begin
    self.forwarded = mc.telemetry.counters["lm_tokens"]
    mc.close()
    shutil.rmtree(place)
    return seconds


def _answer(mc: MegaContext, question: str = _QUESTION) -> float:
  """The moment the first token of the answer is there."""
  moments: list[float] = []
  mc.generate(
    question, max_new_tokens=1,
    on_text=lambda _: moments.append(time.perf_counter()),
  )
  return moments[0]


def run(settings: Settings, folder) -> Report:
  """Measures every contestant; what is finished in `folder` is kept."""
  folder = report.make_folder(folder)
  field = Contestants(settings, settings.load(), folder)
  asked = dataclasses.asdict(settings)
  asked.pop("lengths")
  out = Report("ttft", dataclasses.asdict(settings))
  cells = {
    n: report.cell(folder, f"length-{n}", asked | {"length": n},
                   functools.partial(_measure, settings, field, n))
    for n in settings.lengths
  }
  for found in cells.values():
    out.notes += found["notes"]
  times = {n: found["times"] for n, found in cells.items()}
  _tabulate(out, settings, times)
  _add_forwarded(out, {n: found.get("forwarded", {})
                       for n, found in cells.items()})
  out.charts.append(report.Chart(
    f"Time to the first token, W={settings.window}", "tokens of the document",
    "seconds", _series(times), log_x=True, log_y=True))
  out.write(folder)
  return out


def _measure(settings: Settings, field: Contestants, n: int) -> dict:
  """Seconds of every contestant and repeat, at one length."""
  arms = field.arms(n)
  times: dict[str, list[float]] = {name: [] for name in arms}
  notes, forwarded = [], {}
  for repeat in range(-1, settings.repeats):  # the first one compiles
    for name, arm in list(arms.items()):
      slow = name in (_TORCH, _LLAMA)
      if slow and not 0 <= repeat < settings.slow_repeats:
        continue
      try:
        seconds = arm(n)
      except McjaxError as error:
        notes.append(f"{name} was not measured: {error}")
        del arms[name], times[name]
        continue
      progress(f"ttft {n:,}: {name} {seconds:.2f} s")
      forwarded[name] = field.forwarded
      if repeat >= 0:
        times[name].append(seconds)
  return {"times": times, "notes": notes, "forwarded": forwarded}


def _tabulate(out: Report, settings: Settings, times) -> None:
  names = list(dict.fromkeys(name for arms in times.values() for name in arms))
  rows = []
  for name in names:
    row: list = [name]
    for n, arms in times.items():
      seconds = median(arms[name]) if arms.get(name) else None
      row.append(seconds)
      if seconds is not None:
        out.add(f"{name}: TTFT at {n}", seconds, "s")
    rows.append(row)
  out.tables.append(Table(
    f"Seconds to the first token, W={settings.window}",
    ("contestant", *(f"N={n:,}" for n in times)), rows,
  ))
  for n, arms in times.items():
    if "full attention" not in arms:
      continue
    for name in ("MegaContext, from text", _FROM_TREE):
      out.add(f"full attention relative to {name} at {n}",
              report.ratio_median(arms["full attention"], arms[name]), "ratio")
  shorter = 8192 if 8192 in times else settings.lengths[0]
  longest = settings.lengths[-1]
  for tree in (n for n in names if n.startswith(_FROM_TREE)):
    out.add(
      f"{tree}: {longest} relative to {shorter}",
      median(times[longest][tree]) / median(times[shorter][tree]), "ratio",
    )
  out.tables.append(Table(
    "Ratios", ("what", "ratio"),
    [[k, v.value] for k, v in out.figures.items() if v.unit == "ratio"],
  ))


def _add_forwarded(out: Report, counts: dict[int, dict[str, int]]) -> None:
  """Adds what every contestant's base ran on until the first token."""
  names = list(dict.fromkeys(name for arms in counts.values() for name in arms))
  if not names:  # cells that were kept by a version that did not count
    return
  for n, arms in counts.items():
    for name, count in arms.items():
      out.add(f"{name}: tokens forwarded at {n}", count, "tokens")
  out.tables.append(Table(
    "Tokens that the base runs on until the first token",
    ("contestant", *(f"N={n:,}" for n in counts)),
    [[name, *(arms.get(name) for arms in counts.values())] for name in names]))
  out.notes.append(
    f"Tokens that the base runs on: without those that it decodes. "
    f"All are asked “{_QUESTION}”, MegaContext also “{_ANSWERED}”, which the "
    "standard library answers.")


def _series(times) -> dict[str, tuple[list, list]]:
  series: dict[str, tuple[list, list]] = {}
  for n, arms in times.items():
    for name, seconds in arms.items():
      if seconds:
        xs, ys = series.setdefault(name, ([], []))
        xs.append(n)
        ys.append(median(seconds))
  return series
