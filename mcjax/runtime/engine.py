"""Engine: many histories at once over one frozen LM.

Each history is a `MegaContext` with a window of its own; what they decode goes
through one device loop, a row each. A history asks for its next few tokens
whenever it is ready, so answers begin, end and are refocused while others go
on, and nothing recompiles. Prompts and refocuses that come while the caches
are in use are run together too; scores and search are each history's own.

On a mesh the rows are split over its `data` and `fsdp` axes, key heads over
`tensor`, the base's parameters as in training (see `window/spread.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
import threading
import time
import uuid

from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.gist.encoder import GistEncoder, load_gistnet
from mcjax.lens.policy import LensNetPolicy
from mcjax.parallel.sharding import RULES, Rules
from mcjax.runtime.focus_loop import Result
from mcjax.runtime.megacontext import MegaContext
from mcjax.types import McjaxError
from mcjax.window import spread as spreads
from mcjax.window.context_lm import ContextLM
from mcjax.window.decoding import Decoder, Job, Said

_PATIENCE = 0.25  # of the last block's time, that a ready row waits for others
_LEAST = 0.02  # seconds that it waits in any case
_SPLICES = 8  # run together, where devices have arithmetic to spare


def _splices_of(lm: BaseLM, slots: int) -> int:
  device = next(iter(lm.params["embed"].devices()))
  return 1 if device.platform == "cpu" else min(slots, _SPLICES)


class _Asked:
  """A job that waits for its block."""

  def __init__(self, job: Job):
    self.job = job
    self.said: Said | None = None
    self.error: BaseException | None = None
    self.done = threading.Event()


class Engine:
  """Decodes up to `slots` histories together; its methods are thread-safe.

  Attributes:
    lm: the frozen base, as histories use it.
    config: of every history.
    slots: histories open at one time, at most.
    blocks: device loops run so far.
    rows: answers decoded in them, summed: rows / blocks is the mean batch.
    tokens: decoded so far.
    seconds: spent in device loops.
    splices: that run together, at most; on a mesh, of each device that has
      rows of its own.
  """

  def __init__(self, lm: BaseLM, config: Config | None = None, *,
               slots: int = 16, splices: int | None = None,
               gistnet: GistEncoder | None = None,
               lensnet: Callable[[], LensNetPolicy] | None = None,
               mesh=None, rules: Rules = RULES):
    """An engine with no history open.

    Args:
      lm: the frozen base.
      config: of every history.
      slots: see the class.
      splices: see the class. A group is padded to so many. By default 1 on
        CPUs, whose cores one splice fills: sixteen together take 0.7 to 1.05
        of the time of sixteen single ones there (docs/trials.md), and padding
        costs more than that saves. Elsewhere 8, or all slots if fewer: there
        reading the weights takes most of a splice's time.
      gistnet: the compressor; the shipped one by default.
      lensnet: makes the LensNet of a history; the shipped one by default.
      mesh: of `parallel.sharding.make_mesh`; by default that on which the base
        was loaded, else one device. A base loaded on one device stays there
        too, beside its parts on the mesh.
      rules: how parameters and rows are split.

    Raises:
      McjaxError: a setting is out of range, or does not divide on the mesh.
    """
    if not isinstance(slots, int) or slots < 1:
      raise McjaxError(f"slots must be a whole number >= 1, got {slots}")
    self._spread = spread = spreads.spread_of(lm, mesh, rules)
    if slots % spread.parts:
      raise McjaxError(
        f"slots={slots} do not divide among {spread.parts} devices, the mesh's "
        f"{' × '.join(spread.batch)}")
    share = slots // spread.parts
    if splices is None:
      splices = _splices_of(lm, share)
    if not isinstance(splices, int) or not 1 <= splices <= share:
      raise McjaxError(
        f"splices must be a whole number in [1, {share}] (the slots of a "
        f"device), got {splices}")
    self.slots, self.splices, self._rules = slots, splices, rules
    self._whole, self.lm = lm, spreads.at_home(lm, spread)
    self.config = config or Config()
    self.blocks = self.rows = self.tokens = 0
    self.seconds = self._last = 0.0
    self._gistnet = (gistnet or load_gistnet(self.lm)).bound_to(self.lm)
    self._lensnet = lensnet or (lambda: None)
    spreads.check_whole(
      self.lm, self.config.policy == "oracle", self._gistnet.config.input_layer)
    self._decoder: Decoder | None = None
    self._open: dict[int, MegaContext | None] = {}
    self._lock = threading.Lock()
    self._ready = threading.Condition(self._lock)
    self._asked: list[_Asked] = []
    self._answering = 0
    self._closed = False
    self._worker = threading.Thread(
      target=self._work, name="mcjax-engine", daemon=True)
    self._worker.start()

  def create(self, url: str, lensnet: LensNetPolicy | None = None, *,
             system: str = "") -> MegaContext:
    """As `MegaContext.create`, in a slot that is free.

    Raises:
      McjaxError: no slot is free, or as there.
    """
    return self._joined(lambda: MegaContext.create(
      url, self.lm, self.config, self._gistnet, lensnet or self._lensnet(),
      system=system))

  def open(self, url: str, lensnet: LensNetPolicy | None = None, *,
           system: str | None = None) -> MegaContext:
    """As `MegaContext.open`, in a slot that is free.

    Raises:
      McjaxError: no slot is free, or as there.
    """
    return self._joined(lambda: MegaContext.open(
      url, self.lm, self.config, self._gistnet, lensnet or self._lensnet(),
      system=system))

  def warm_up(self) -> None:
    """Compiles what answers need, in a history that is thrown away."""
    with self.create(f"memory://warm-up-{uuid.uuid4().hex}/") as mc:
      mc.generate("Ready?", 1)

  @property
  def spliced(self) -> tuple[int, int]:
    """Splices so far, and the programs that ran them; fewer if together."""
    if self._decoder is None:
      return 0, 0
    return self._decoder.splicer.done, self._decoder.splicer.runs

  @property
  def histories(self) -> list[MegaContext]:
    """Those that are open."""
    with self._lock:
      return [mc for mc in self._open.values() if mc is not None]

  def _joined(self, make: Callable[[], MegaContext]) -> MegaContext:
    with self._lock:
      free = sorted(set(range(self.slots)) - set(self._open))
      if self._closed or not free:
        raise McjaxError(
          "the engine is closed" if self._closed else
          f"all {self.slots} slots are taken: close a history first")
      row = free[0]
      self._open[row] = None  # taken; others decode while it opens
    try:
      mc = make()
    except BaseException:
      self._left(row)
      raise
    mc.join(self._decoder_for(mc.context), row, self._run,
            lambda: self._left(row))
    with self._lock:
      self._open[row] = mc
    return mc

  def _decoder_for(self, context: ContextLM) -> Decoder:
    with self._lock:
      if self._decoder is None:
        self._decoder = context.decoder_of(
          self.slots, self.splices, self._params(context), self._spread)
      return self._decoder

  def _params(self, context: ContextLM) -> dict:
    if self._spread.mesh is None:
      return context.lm.params
    return spreads.params_of(
      self._gistnet.reader(self._whole), self._spread, self._rules)

  def _left(self, row: int) -> None:
    with self._lock:
      self._open.pop(row, None)

  def _run(self, steps: Generator[Job, Said, Result], context: ContextLM
           ) -> Result:
    """What the steps return, their jobs decoded beside those of others."""
    del context
    with self._ready:
      self._answering += 1
    try:
      job = next(steps)
      while True:
        job = steps.send(self._decoded(job))
    except StopIteration as end:
      return end.value
    finally:
      with self._ready:
        self._answering -= 1
        self._ready.notify_all()

  def _decoded(self, job: Job) -> Said:
    asked = _Asked(job)
    with self._ready:
      if self._closed:
        raise McjaxError("the engine is closed")
      self._asked.append(asked)
      self._ready.notify_all()
    asked.done.wait()
    if asked.error is not None:
      raise asked.error
    assert asked.said is not None
    return asked.said

  def _work(self) -> None:
    while True:
      with self._ready:
        while not self._asked and not self._closed:
          self._ready.wait()
        if self._closed and not self._asked:
          return
        self._ready.wait_for(  # a short while, for those about to ask
          lambda: len(self._asked) >= self._answering,
          max(_LEAST, _PATIENCE * self._last))
        batch, self._asked = self._asked, []
      self._decode(batch)

  def _decode(self, batch: list[_Asked]) -> None:
    assert self._decoder is not None
    begin = time.perf_counter()
    try:
      said = self._decoder.run([asked.job for asked in batch])
      for asked, one in zip(batch, said):
        asked.said = one
      self.blocks += 1
      self.rows += len(batch)
      self.tokens += sum(len(one.tokens) for one in said)
      self._last = time.perf_counter() - begin
      self.seconds += self._last
    except BaseException as error:
      for asked in batch:
        asked.error = error
    for asked in batch:
      asked.done.set()

  def close(self) -> None:
    """Waits for answers at work, commits and closes every history."""
    for mc in self.histories:
      mc.close()
    with self._ready:
      self._closed = True
      self._ready.notify_all()
    self._worker.join()

  def __repr__(self) -> str:
    return f"Engine({self.lm.name}, {len(self._open)} of {self.slots} slots)"

  def __enter__(self) -> Engine:
    return self

  def __exit__(self, *_) -> None:
    self.close()
