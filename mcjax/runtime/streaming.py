"""An answer as an iterator over its pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import queue
import threading


class _LeftError(Exception):
  """The consumer of a stream has left."""


def pieces_of(answer: Callable[[Callable[[str], None]], object]
              ) -> Iterator[str]:
  """Yields what `answer` gives to the function that it is called with.

  It runs in a thread; once the consumer has left, that function raises.
  """
  pieces: queue.Queue = queue.Queue()
  left = threading.Event()

  def on_piece(piece: str) -> None:
    pieces.put(piece)
    if left.is_set():
      raise _LeftError

  def work() -> None:
    try:
      answer(on_piece)
      pieces.put(None)
    except BaseException as error:
      pieces.put(error)

  worker = threading.Thread(target=work, name="mcjax-stream", daemon=True)
  worker.start()
  try:
    while (piece := pieces.get()) is not None:
      if isinstance(piece, BaseException):
        raise piece
      yield piece
  finally:
    left.set()
    worker.join()
