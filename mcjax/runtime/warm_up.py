"""Programs compiled beside a first answer, and after it.

A large base takes long to compile. A first answer waits only for the programs
that it uses: the largest is compiled in a thread while the focus settles, the
others as they are called. What later answers may need follows once the user
has had the answer for a while; JAX lets a call wait for a thread that compiles
the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import logging
import threading
import time

import numpy as np

from mcjax.config import Config
from mcjax.focus import allocator
from mcjax.focus.policy import Policy
from mcjax.gist.encoder import BATCH_SIZES, GistEncoder
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM

_PAUSE = 2.0  # seconds without a call, after which the rest is compiled
_GLANCE = 0.1  # seconds between looks whether anybody is still there


class WarmUp:
  """Compiles in a thread what one history will need."""

  def __init__(self, programs: Callable[[], Iterator[None]]):
    """Begins at once.

    Args:
      programs: compiles one at a time, that of the first answer first.
    """
    self._programs = programs
    self._busy = 0
    self._since = time.monotonic()
    self._stopped = False
    threading.Thread(target=self._work, name="mcjax-compile").start()

  def __enter__(self) -> WarmUp:
    """A call of the user's begins."""
    self._busy += 1
    return self

  def __exit__(self, *_) -> None:
    self._busy -= 1
    self._since = time.monotonic()

  def stop(self) -> None:
    """Lets the thread end with the program that it compiles."""
    self._stopped = True

  def _work(self) -> None:
    try:
      for _ in self._programs():
        while self._wanted() and not self._idle():
          time.sleep(_GLANCE)
        if not self._wanted():
          return
    except Exception:  # whatever it is will be met, and told, where it is used
      logging.getLogger(__name__).debug("not compiled ahead", exc_info=True)

  def _wanted(self) -> bool:
    return not self._stopped and threading.main_thread().is_alive()

  def _idle(self) -> bool:
    return not self._busy and time.monotonic() - self._since > _PAUSE


def programs_of(context: ContextLM, config: Config, encoder: GistEncoder,
                policy: Policy, *, reads_little: bool) -> Iterator[None]:
  """Compiles what a history's loop needs, a program at a time.

  Args:
    context, config, encoder, policy: of the history.
    reads_little: its next answer is likely read from a few sentences.
  """
  yield from context.programs(reads_little)
  legal = allocator.Legal(*np.zeros((2, context.window.window), bool))
  allocator.plan_edits(
    np.zeros(0, np.float32), legal, free=0, need=0,
    threshold=config.threshold, max_edits=config.max_edits)
  for size in BATCH_SIZES:
    gists = encoder.encode_tokens(np.zeros((size, BRANCHING), np.int32))
    yield
    encoder.encode_gists(
      np.broadcast_to(gists[:, None], (size, BRANCHING, gists.shape[1])), 2)
    yield
  policy.warm_up(context)
