"""llama.cpp on the same GGUF file, as a user of it runs the base.

It holds every token in its own cache and keeps weights quantised as they lie
in the file (https://github.com/abetlen/llama-cpp-python).
"""

from __future__ import annotations

import os
import time

import numpy as np

from mcjax.base.load import locate
from mcjax.types import McjaxError

_BATCH = 512  # tokens a step of a prompt, llama.cpp's default


class LlamaCpp:
  """A base in llama.cpp with room for `context` tokens.

  Args:
    base: as of `load_base_lm`; a GGUF file or a name that stands for one.
    context: tokens of its cache.

  Raises:
    McjaxError: llama-cpp-python is not installed, or the base is no GGUF file.
  """

  def __init__(self, base: str, context: int):
    try:
      import llama_cpp
    except ImportError as error:
      raise McjaxError(
        "the llama.cpp baseline needs pip install 'mcjax[llama]'") from error
    self._library = llama_cpp
    path = locate(base)
    if path.suffix != ".gguf":
      raise McjaxError(f"llama.cpp reads GGUF files; {path} is none")
    threads = len(os.sched_getaffinity(0))
    try:
      self._llama = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=_BATCH, n_threads=threads,
        n_threads_batch=threads, verbose=False)
    except ValueError as error:
      raise McjaxError(f"llama.cpp does not load {path}: {error}") from error

  def prefill(self, token_ids: np.ndarray) -> np.ndarray:
    """Logits [V] float32 behind ids [T]; keeps the cache for `decode`."""
    self._llama.reset()
    self._llama.eval(np.asarray(token_ids).tolist())
    logits = self._logits()
    self._next = int(np.argmax(logits))
    return logits

  def decode(self, count: int) -> float:
    """Seconds for `count` greedy tokens; the cache is cut back afterwards."""
    start, token = self._llama.n_tokens, self._next
    begin = time.perf_counter()
    for _ in range(count):
      self._llama.eval([token])
      token = int(np.argmax(self._logits()))
    seconds = time.perf_counter() - begin
    self._llama.n_tokens = start  # the next eval drops what lies behind
    return seconds

  def _logits(self) -> np.ndarray:
    first = self._library.llama_get_logits_ith(self._llama.ctx, -1)
    return np.ctypeslib.as_array(first, (self._llama.n_vocab(),)).copy()
