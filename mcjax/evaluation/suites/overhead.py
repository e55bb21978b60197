"""What the loop costs: tokens/s against plain decoding, at any history length.

One run interleaves, repeat by repeat: plain decoding of the same base behind a
full cache of W tokens; the loop with a refocus every 32 tokens at several
history lengths; the loop while its query keeps moving, so that it expands and
collapses; and the loop that rebuilds its cache after every edit (exact mode).
Each is timed just after plain decoding, and its ratio is to that. Beside the
clock stands the process's CPU time, which other work on the machine disturbs
less.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import gc
import multiprocessing
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.config import Config
from mcjax.evaluation.data import texts
from mcjax.evaluation.report import writer as report
from mcjax.evaluation.report.writer import Report, Table, median, progress
from mcjax.evaluation.systems import baselines
from mcjax.evaluation.systems.llama_cpp import LlamaCpp
from mcjax.evaluation.systems.loop_arm import PHASES, LoopArm, make_tree
from mcjax.evaluation.systems.models import Models, ModelSettings
from mcjax.runtime.telemetry import peak_memory_mib
from mcjax.types import BRANCHING, McjaxError


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
  """What is measured; `quick` makes it small.

  Attributes:
    window: W.
    policy: of the loop; any but oracle.
    histories: history lengths in tokens.
    moving_history: history of the loop whose query moves.
    exact_history: history of the loop in exact mode.
    refocus_every: tokens between refocus steps.
    blocks: blocks of 32 tokens per arm and repeat.
    exact_blocks: the same for exact mode, which is slow.
    repeats: interleaved repeats.
    memory_histories: peak memory is measured at these, each in a process of
      its own; none skips it.
    torch: measure PyTorch transformers too, where it is installed.
    llama: measure llama.cpp on the same GGUF file too, where it is installed.
    llama_context: tokens in its cache when its memory is measured.
    text: files of the history; the standard library if empty.
  """

  window: int = 2048
  policy: str = "auto"
  histories: tuple[int, ...] = (8192, 32768, 131072, 1 << 20)
  moving_history: int = 32768
  exact_history: int = 32768
  refocus_every: int = 32
  blocks: int = 4
  exact_blocks: int = 2
  repeats: int = 5
  memory_histories: tuple[int, ...] = (32768, 1 << 20)
  torch: bool = True
  llama: bool = True
  llama_context: int = 8192
  text: tuple[str, ...] = ()

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      window=512, histories=(2048, 4096), moving_history=4096,
      exact_history=2048, blocks=1, exact_blocks=1, repeats=2,
      memory_histories=(), torch=False, llama=False,
    )
    return cls(**{**small, **changes})


def run(settings: Settings, folder) -> Report:
  """Measures everything; what is finished in `folder` already is kept."""
  folder = report.make_folder(folder)
  models = settings.load()
  lm = models.lm
  asked = dataclasses.asdict(settings)

  def cell(name: str, measure):
    return report.cell(folder, name, asked, measure)

  memory = {
    h: cell(f"memory-{h}",
            functools.partial(_own_peak, settings, folder, h))
    for h in settings.memory_histories
  }
  decoding = cell("decoding", lambda: _decoding(settings, models, folder))
  times, before = (
    {name: Times(*values) for name, values in decoding[key].items()}
    for key in ("times", "before")
  )
  out = Report("overhead", asked)
  _tabulate(out, settings, decoding["facts"], times, before)
  _count(out, settings, lm, decoding["facts"], times)
  _add_memory(out, memory)
  _add_peers(out, settings, lm, cell)
  out.charts.append(_chart(settings, times, before))
  out.write(folder)
  return out


def _decoding(settings: Settings, models: Models, folder) -> dict:
  """Times of every arm and of plain decoding beside it; the arms' phases."""
  arms, plain = _make_arms(settings, models, folder)
  for arm in arms.values():
    arm.decode(1)
    arm.reset()
  times, before = _interleave(settings, arms, plain)
  facts = {name: _facts(arm) for name, arm in arms.items()}
  for arm in arms.values():
    arm.close()
  return {"times": times, "before": before, "facts": facts}


def _facts(arm: LoopArm) -> dict:
  counters = arm.loop.telemetry.counters
  return {
    "refocus_ms": arm.refocus_ms(),
    "edits": arm.per_refocus("edits"),
    "expands": arm.per_refocus("expands"),
    "nodes_touched": arm.per_refocus("nodes_touched"),
    "extra": counters["lm_tokens"] / max(1, counters["decoded_tokens"]),
    "phases_ms": arm.phases_ms(),
  }


def _make_arms(settings: Settings, models: Models, folder):
  def arm(history: int, kv: str = "splice", moving: bool = False) -> LoopArm:
    config = Config(
      window=settings.window, kv=kv, refocus_every=settings.refocus_every,
      policy=settings.policy,
    )
    own = folder / f"{kv}-moving" if moving else folder / kv
    tree = make_tree(models, own, history, settings.text)
    progress(f"preparing the loop at {history:,} tokens, {kv}")
    return LoopArm(models, tree, config, moving)

  arms = {f"splice {h}": arm(h) for h in settings.histories}
  arms["moving"] = arm(settings.moving_history, moving=True)
  arms["exact"] = arm(settings.exact_history, kv="exact")
  lm = models.lm
  ids = texts.tokens(lm.tokenizer, settings.window, settings.text)
  plain = baselines.PlainDecoder(lm, ids)
  gc.collect()
  return arms, plain


class Times(NamedTuple):
  """Seconds per token of every repeat, by the clock and of CPU time."""

  wall: list[float]
  cpu: list[float]


def _interleave(settings: Settings, arms, plain):
  """Times of every arm, and of plain decoding just before each of them."""
  times = {name: Times([], []) for name in arms}
  before = {name: Times([], []) for name in arms}

  def measure(source, blocks: int, into: Times) -> None:
    count, begin = blocks * BRANCHING, time.process_time()
    into.wall.append(source.decode(blocks) / count)
    into.cpu.append((time.process_time() - begin) / count)

  for repeat in range(settings.repeats):
    progress(f"overhead: repeat {repeat + 1} of {settings.repeats}")
    for name, arm in arms.items():
      blocks = settings.exact_blocks if name == "exact" else settings.blocks
      measure(plain, blocks, before[name])
      measure(arm, blocks, times[name])
  return times, before


def _tabulate(out: Report, settings, facts, times, before) -> None:
  """Rates and phases; ratios against the plain decoding beside each arm."""
  plain = Times(*(
    [t for b in before.values() for t in b[k]] for k in range(2)
  ))
  rows = [["plain", 1 / median(plain.wall), 1.0, 1e3 * median(plain.cpu), 1.0,
           *[None] * 4]]
  out.add("plain: decode rate", 1 / median(plain.wall), "tokens/s")
  out.add("plain: host CPU time", 1e3 * median(plain.cpu), "ms/token")
  phase_rows = []
  for name, fact in facts.items():
    rate = 1 / median(times[name].wall)
    ratio = report.ratio_median(before[name].wall, times[name].wall)
    cpu = 1e3 * median(times[name].cpu)
    cpu_ratio = report.ratio_median(before[name].cpu, times[name].cpu)
    rows.append([
      name, rate, ratio, cpu, cpu_ratio, fact["refocus_ms"], fact["edits"],
      fact["expands"], fact["nodes_touched"],
    ])
    phase_rows.append([name, *fact["phases_ms"].values()])
    out.add(f"{name}: decode rate", rate, "tokens/s")
    out.add(f"{name}: rate relative to plain", ratio, "ratio")
    out.add(f"{name}: host CPU time", cpu, "ms/token")
    out.add(f"{name}: CPU time of plain relative to it", cpu_ratio, "ratio")
    out.add(f"{name}: refocus latency", fact["refocus_ms"], "ms")
    out.add(f"{name}: edits per refocus", fact["edits"], "edits")
    for phase, ms in fact["phases_ms"].items():
      out.add(f"{name}: {phase}", ms, "ms/token")
  out.tables.append(Table(
    f"Decoding at W={settings.window}, refocus every "
    f"{settings.refocus_every} tokens",
    ("arm", "tokens/s", "÷ plain", "CPU ms/token", "÷ plain in CPU time",
     "refocus ms", "edits/refocus",
     "expands/refocus", "nodes touched/refocus"), rows,
  ))
  out.tables.append(
    Table("Milliseconds per token", ("arm", *PHASES), phase_rows)
  )
  first, last = (f"splice {h}" for h in
                 (settings.histories[0], settings.histories[-1]))
  for k, kind in enumerate(("", ", CPU time")):
    # Each relative to the plain decoding beside it: both saw the same machine.
    above, below = (
      [t / p for t, p in zip(times[n][k], before[n][k])] for n in (first, last)
    )
    out.add(f"longest history relative to shortest{kind}",
            median(above) / median(below), "ratio")
  out.add("exact refocus latency relative to moving splice",
          facts["exact"]["refocus_ms"] / facts["moving"]["refocus_ms"],
          "ratio")


def _count(out: Report, settings, lm, facts, times) -> None:
  """FLOPs and bytes per token, beside what the device can do."""
  c = lm.config
  attention = 4 * c.n_layers * c.n_heads * c.head_dim * settings.window
  decode = c.flops_per_token + attention
  weights = sum(a.nbytes for a in jax.tree.leaves(lm.params))
  if not c.tie_embeddings:
    weights -= lm.params["embed"].nbytes  # one row of it is read
  item = lm.params["embed"].dtype.itemsize
  kv = 2 * c.n_layers * c.n_kv_heads * c.head_dim * settings.window * item
  flops_peak, bytes_peak = roofline(lm.params["embed"].dtype)
  rows = []
  for name, fact in facts.items():
    extra = fact["extra"]
    flops = decode * (1 + extra)
    moved = (weights + kv) * (1 + (extra > 0) / settings.refocus_every)
    rate = 1 / median(times[name].wall)
    rows.append([name, flops / 1e6, extra, moved / 1e6, flops * rate / 1e9,
                 100 * flops * rate / flops_peak, moved * rate / 1e9,
                 100 * moved * rate / bytes_peak])
    out.add(f"{name}: tokens forwarded per token", 1 + extra, "tokens")
    out.add(f"{name}: FLOPs per token", flops, "FLOP")
    out.add(f"{name}: bytes per token", moved, "bytes")
  out.add("device: matrix product", flops_peak, "FLOP/s")
  out.add("device: memory read", bytes_peak, "bytes/s")
  out.tables.append(Table(
    "Counted work per token; % of what the device does in a large matrix "
    f"product ({flops_peak / 1e9:.0f} GFLOP/s) and a large read "
    f"({bytes_peak / 1e9:.0f} GB/s)",
    ("arm", "MFLOP", "extra token-forwards", "MB", "GFLOP/s", "% FLOPs",
     "GB/s", "% bytes"), rows,
  ))


def roofline(dtype) -> tuple[float, float]:
  """Measured FLOP/s of a matrix product and bytes/s of a read, best of 5."""
  a = jnp.ones((1024, 1024), dtype)
  big = jnp.ones(1 << 26, jnp.float32)
  product, read = jax.jit(lambda x: x @ x), jax.jit(jnp.max)
  def best(function, argument) -> float:
    jax.block_until_ready(function(argument))
    seconds = []
    for _ in range(5):
      begin = time.perf_counter()
      jax.block_until_ready(function(argument))
      seconds.append(time.perf_counter() - begin)
    return min(seconds)
  return 2 * 1024**3 / best(product, a), big.nbytes / best(read, big)


def _add_peers(out: Report, settings: Settings, lm, cell) -> None:
  """The same base in other programs, decoding beside plain decoding."""
  window = settings.window
  if settings.torch:
    _add_pairs(out, "PyTorch transformers, float32", cell(
      "torch", lambda: _pairs(
        settings, lm, lambda: baselines.TorchDecoder(lm))))
  if settings.llama:
    _add_pairs(out, "llama.cpp, weights as in the file", cell(
      "llama", lambda: _pairs(
        settings, lm, lambda: LlamaCpp(settings.base, window + BRANCHING))))
    ids = texts.tokens(lm.tokenizer, settings.llama_context, settings.text)
    _add_llama_memory(out, settings, cell("llama-memory", lambda: (
      _in_own_process(llama_probe, settings, ids))))


def _pairs(settings, lm, make: Callable[[], Any]) -> list | str:
  """Seconds a token of another program and of plain decoding beside it.

  Args:
    settings: of the suite.
    lm: the base.
    make: gives the program, with `prefill` and `decode`.

  Returns:
    A pair a repeat, or why there are none.
  """
  try:
    peer = make()
  except McjaxError as error:
    return str(error)
  ids = texts.tokens(lm.tokenizer, settings.window, settings.text)
  plain = baselines.PlainDecoder(lm, ids)
  peer.prefill(ids)
  peer.decode(2)
  plain.decode(1)
  return [
    (peer.decode(8) / 8, plain.decode(1) / plain.block)
    for _ in range(settings.repeats)
  ]


def _add_pairs(out: Report, name: str, pairs: list | str) -> None:
  if isinstance(pairs, str):
    out.notes.append(f"{name}: not measured: {pairs}")
    return
  ours, theirs = median([p for _, p in pairs]), median([t for t, _ in pairs])
  out.add(f"{name}: decode rate", 1 / theirs, "tokens/s")
  out.add(f"plain relative to {name}", median([t / p for t, p in pairs]),
          "ratio")
  out.notes.append(
    f"Plain decoding behind {out.settings['window']:,} tokens: {1 / ours:.1f} "
    f"tokens/s; {name}: {1 / theirs:.1f} tokens/s (interleaved).")


def memory_probe(settings: Settings, folder: str, history: int, pipe) -> None:
  """Body of a process of its own: decodes a while, sends its peak memory."""
  use_compilation_cache(pathlib.Path(folder) / "compiled")
  models = settings.load()
  tree = make_tree(models, pathlib.Path(folder), history, settings.text)
  arm = LoopArm(models, tree, Config(window=settings.window), moving=True)
  arm.decode(settings.blocks)
  arm.close()
  pipe.send((peak_memory_mib(), _device_peak_mib()))


def llama_probe(settings: Settings, token_ids, pipe) -> None:
  """Body of a process of its own: sends what llama.cpp adds to its memory."""
  before = peak_memory_mib()
  try:
    llama = LlamaCpp(settings.base, len(token_ids) + BRANCHING)
  except McjaxError:
    return
  llama.prefill(token_ids)
  llama.decode(BRANCHING)
  pipe.send(peak_memory_mib() - before)


def _device_peak_mib() -> float | None:
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get("peak_bytes_in_use")
  return None if peak is None else peak / 2**20


def _own_peak(settings: Settings, folder, history: int):
  """Peak memory of a process of its own that compiles nothing."""
  progress(f"peak memory at {history:,} tokens")
  models = settings.load()
  make_tree(models, folder, history, settings.text).close()  # ingest apart
  del models
  probe = functools.partial(
    _in_own_process, memory_probe, settings, str(folder), history)
  probe()  # fills the compilation cache
  return probe()


def _in_own_process(target: Callable[..., None], *arguments):
  """What a process sends that runs `target(*arguments, pipe)`, or None."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  process = context.Process(target=target, args=(*arguments, theirs))
  process.start()
  theirs.close()
  try:
    return ours.recv()
  except EOFError:
    return None
  finally:
    process.join()


def _add_memory(out: Report, memory: dict) -> None:
  known = {h: m for h, m in memory.items() if m is not None}
  for history, (host, device) in known.items():
    out.add(f"peak host memory at {history}", host, "MiB")
    if device is not None:
      out.add(f"peak device memory at {history}", device, "MiB")
  if len(known) > 1:
    first, *_, last = known.values()
    out.add("peak host memory, longest relative to first",
            last[0] / first[0], "ratio")
  if known:
    out.tables.append(Table(
      "Peak memory, a process each",
      ("history", "host MiB", "device MiB"),
      [[h, host, device] for h, (host, device) in known.items()],
    ))


def _add_llama_memory(out: Report, settings: Settings,
                      mib: float | None) -> None:
  if mib is None:
    return
  out.add(f"llama.cpp: peak host memory at {settings.llama_context}", mib,
          "MiB")
  out.notes.append(
    f"llama.cpp takes {mib:,.0f} MiB behind {settings.llama_context:,} tokens, "
    "what its process had before left out; the table's figures are of whole "
    "processes.")


def _chart(settings: Settings, times, before) -> report.Chart:
  xs = list(settings.histories)
  names = [f"splice {h}" for h in xs]
  rates = [1 / median(times[n].wall) for n in names]
  plain = [1 / median(before[n].wall) for n in names]
  return report.Chart(
    f"Decoding at W={settings.window}", "tokens of history", "tokens/s",
    {"the loop": (xs, rates), "plain decoding beside it": (xs, plain)},
    log_x=True)
