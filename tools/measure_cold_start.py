"""Seconds from a process's start to its first answer through the API.

  python tools/measure_cold_start.py --cold     # nothing compiled before
  python tools/measure_cold_start.py            # with what earlier starts kept

Every run is a process of its own that imports mcjax, loads the base, starts a
history in a folder, ingests about 40,000 tokens of plain English (the manual
that comes with Python) and asks one question. Weights are in the user cache
already. Beside wall-clock seconds stand those of the processor, in which other
work on the machine counts less, and how many programs were compiled.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_COLD = flags.DEFINE_bool("cold", False, "Start with an empty cache.")
_RUNS = flags.DEFINE_integer("runs", 1, "Processes, one after another.")
_BASE = flags.DEFINE_string("base", "smollm2-135m", "The base LM.")
_CHARACTERS = flags.DEFINE_integer("characters", 170_000, "Of the text.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Of the answer.")
_PROGRAMS = flags.DEFINE_bool("programs", False, "List what is compiled.")
_CHILD = flags.DEFINE_bool("child", False, "For the tool itself.")
_QUESTION = "What does the break statement do?"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


def _processor_seconds() -> float:
  """Of this process and of those that it started and that have ended."""
  used = [resource.getrusage(who) for who in
          (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(u.ru_utime + u.ru_stime for u in used)


class _Watch:
  """Measures the parts of one start."""

  def __init__(self):
    self.parts: dict[str, dict[str, float]] = {}
    self.programs: list[tuple[str, float]] = []
    self._hits = 0
    self._started = float(os.environ["MCJAX_STARTED"])
    self._last = self._now()._replace_first(0.0)

  def _now(self) -> "_Point":
    return _Point((time.time() - self._started, _processor_seconds(),
                   len(self.programs), self._hits))

  def listen(self) -> None:
    """Counts programs from now on."""
    import jax

    def on_event(event: str, **_) -> None:
      self._hits += event == _HIT

    def on_duration(event: str, seconds: float, **facts) -> None:
      if event == _COMPILE:
        self.programs.append((str(facts.get("fun_name")), seconds))

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)

  def lap(self, name: str) -> None:
    now = self._now()
    self.parts[name] = dict(zip(
      ("seconds", "processor", "programs", "from_cache"),
      (round(a - b, 2) for a, b in zip(now, self._last))))
    self._last = now


class _Point(tuple):
  """Clock, processor seconds, programs, programs from the cache."""

  def _replace_first(self, value: float) -> "_Point":
    return _Point((value, 0.0, *self[2:]))


def _child() -> None:
  """One start; prints its parts as JSON."""
  from pydoc_data import topics

  watch = _Watch()
  import mcjax
  from mcjax import Config, MegaContext, load_base_lm
  watch.listen()
  watch.lap("import")
  lm = load_base_lm(_BASE.value)
  watch.lap("load")
  with tempfile.TemporaryDirectory() as folder:
    mc = MegaContext.create(f"{folder}/tree", lm, Config())
    watch.lap("create")
    text = "\n".join(topics.topics.values())[: _CHARACTERS.value]
    tokens = mc.ingest(text).tokens
    watch.lap("ingest")
    answer = mc.generate(_QUESTION, _TOKENS.value)
    watch.lap("answer")
    mc.close()
    watch.lap("close")
  programs = sorted(watch.programs, key=lambda p: -p[1])
  print(json.dumps({
    "parts": watch.parts, "tokens": tokens, "answer": answer.text,
    "version": mcjax.__version__, "programs": programs}))


def _environment(folder: str) -> dict[str, str]:
  """Of a start that finds the weights, and nothing else, in its cache."""
  from mcjax.base import hub

  weights = hub.fetch(_BASE.value)
  for path in (weights, weights.with_name(weights.name + ".sha256-ok")):
    os.symlink(path, pathlib.Path(folder, path.name))
  return {"MCJAX_CACHE": folder}


def _run(extra: dict[str, str]) -> dict:
  done = subprocess.run(
    [sys.executable, *sys.argv, "--child"], check=True, text=True,
    stdout=subprocess.PIPE,
    env=os.environ | extra | {"MCJAX_STARTED": str(time.time())})
  return json.loads(done.stdout.splitlines()[-1])


def _print(found: dict) -> None:
  print(f"{'':10}{'seconds':>9}{'processor':>11}{'programs':>10}"
        f"{'from cache':>12}")
  total = dict.fromkeys(found["parts"]["load"], 0.0)
  for name, part in [*found["parts"].items(), ("sum", total)]:
    print(f"{name:10}{part['seconds']:9.1f}{part['processor']:11.1f}"
          f"{part['programs']:10.0f}{part['from_cache']:12.0f}")
    for key, value in part.items():
      total[key] += value
  print(f"{found['tokens']:,} tokens; the answer: {found['answer']!r}\n")
  if _PROGRAMS.value:
    for name, seconds in found["programs"]:
      print(f"{seconds:8.2f} s  {name}")


def main(argv) -> None:
  del argv
  if _CHILD.value:
    _child()
    return
  for _ in range(_RUNS.value):
    with tempfile.TemporaryDirectory() as folder:
      _print(_run(_environment(folder) if _COLD.value else {}))


if __name__ == "__main__":
  app.run(main)
