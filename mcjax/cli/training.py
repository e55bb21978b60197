"""What the training mains share: many processes, and how a run ends."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import signal
import sys
from typing import Any

from absl import flags, logging
from etils import epath
import jax

from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.gist.encoder import load_gistnet
from mcjax.parallel import processes
from mcjax.parallel.places import is_remote, place
from mcjax.training.common import data
from mcjax.types import McjaxError

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of many processes; the three flags below are "
  "found by themselves on a TPU pod, under Slurm, Open MPI and Kubernetes.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT at which process 0 is found.")
_COUNT = flags.DEFINE_integer(
  "num_processes", None, "How many processes the run has.", 1)
_PROCESS = flags.DEFINE_integer(
  "process_id", None, "The number of this one, from 0.", 0)
_COMPILE_CACHE = flags.DEFINE_string(
  "compile_cache", "", "Where compiled programs are kept, a folder or gs://…; "
  "the workdir's folder compiled if empty, nowhere if off.")


_NEW: list[epath.Path] = []  # folders that are there for the programs alone


def keep_programs(workdir: str) -> None:
  """Keeps compiled programs where --compile_cache says."""
  said, folder = _COMPILE_CACHE.value, place(workdir) / "compiled"
  if said == "off":
    jax.config.update("jax_enable_compilation_cache", False)
  elif said:
    use_compilation_cache(place(said))
  else:
    _NEW[:] = [f for f in (folder, folder.parent)
               if not is_remote(f) and not f.exists()]
    use_compilation_cache(folder)


def _drop_programs() -> None:
  """Leaves no programs of a run that has failed before it kept anything."""
  if not _NEW or any(f != _NEW[0] for f in _NEW[0].parent.glob("*")):
    return
  for folder in _NEW:
    if folder.exists():
      folder.rmtree()


def run(main: Callable[[list[str]], bool], config: commands.ConfigFlag
        ) -> None:
  """Runs the main of a training program and ends the process.

  Exit status 0: finished. 75: stopped by SIGTERM or Ctrl-C, in whichever
  process, and saved; the same command goes on. 76: another process of the run
  is gone. 1: a mistake, told in one line.

  Args:
    main: returns whether the run is finished.
    config: its --config flag.
  """

  @functools.wraps(main)  # whose module is asked for help
  def guarded(argv: list[str]) -> None:
    if not _DISTRIBUTED.value:
      # Outside the loops there is nothing to save.
      signal.signal(signal.SIGTERM, lambda *_: sys.exit(processes.STOPPED))
      sys.exit(_status(main, argv))
    processes.join(_COORDINATOR.value, _COUNT.value, _PROCESS.value)
    try:
      status = _status(main, argv)
    except McjaxError as error:
      print(f"error: {error}", file=sys.stderr, flush=True)
      processes.leave(1, str(error))
    except Exception as error:
      logging.exception("process failed")
      processes.lost_peer(error)
      processes.leave(1, f"{type(error).__name__}: {error}")
    else:
      processes.leave(status)

  commands.run(guarded, config, flags_of=(__name__,))


def run_lens(config, workdir: str, read_config: Callable[[dict], Any],
             start: Callable[..., Any], export: str | None) -> bool:
  """Runs a part of LensNet's training and writes what has become of it.

  Args:
    config: ConfigDict with base, dtype, gistnet and data.
    workdir: of the run.
    read_config: the run's settings, of the plain values.
    start: makes the run of base, GistNet, settings, stores and workdir.
    export: where the final weights go, if anywhere.

  Returns:
    Whether the run is finished.
  """
  keep_programs(workdir)
  settings = read_config(config.to_dict())
  lm = load_base_lm(config.base, dtype=config.dtype)
  stores = {split: data.open_split(config.data, split, lm=lm)
            for split in ("train", "validation")}
  gistnet = load_gistnet(lm, config.gistnet or None)
  training = start(lm, gistnet, settings, stores, place(workdir))
  done = training.run()
  if done and export:
    training.export(export, {"config": config.to_dict()})
  return done


def _status(main: Callable[[list[str]], bool], argv: list[str]) -> int:
  try:
    with contextlib.suppress(processes.Stopped):
      if main(argv):
        return 0
  except McjaxError:
    _drop_programs()
    raise
  print("stopped and saved; the same command goes on", file=sys.stderr)
  return processes.STOPPED
