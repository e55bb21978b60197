"""Turn: a lock that is handed on in the order in which it was asked for."""

from __future__ import annotations

import collections
import threading


class Turn:
  """`with turn:` waits until all who asked before are done.

  A plain lock may be taken again at once by whoever gave it back.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._taken = False
    self._waiting: collections.deque[threading.Event] = collections.deque()

  def __enter__(self) -> Turn:
    mine = threading.Event()
    with self._lock:
      if not self._taken:
        self._taken = True
        return self
      self._waiting.append(mine)
    try:
      mine.wait()
    except BaseException:  # interrupted: the turn goes to the next one
      with self._lock:
        if mine in self._waiting:
          self._waiting.remove(mine)
          raise
      self.__exit__()
      raise
    return self

  def __exit__(self, *_) -> None:
    with self._lock:
      if self._waiting:
        self._waiting.popleft().set()
      else:
        self._taken = False
