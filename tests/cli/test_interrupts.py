"""Ctrl-C in a chat, by a real terminal."""

import os
import pty
import random
import re
import select
import subprocess
import sys
import time

import numpy as np
import pytest

from mcjax import MegaContext
from mcjax.base.load import load_base_lm
from mcjax.testing import tiny_models


def _outside(tokenizer, ids) -> str:
  """The text that stands between turns, but for line breaks."""
  marks = {tokenizer.decode([i], keep_special=True): i
           for i in tokenizer.special_ids}
  start, end = marks["<|im_start|>"], marks["<|im_end|>"]
  inside, out = False, []
  for i in ids.tolist():
    if i in (start, end):
      inside = i == start
    elif not inside:
      out.append(i)
  text = tokenizer.decode(np.array(out, np.int32)).strip("\n")
  return text + " (an open turn)" * inside


# Done in the child: a fork with Python code of ours in it harms JAX's threads.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class _Terminal:
  """A command on a terminal of its own."""

  def __init__(self, command):
    self._ours, theirs = pty.openpty()
    self._process = subprocess.Popen(
      [sys.executable, "-c", _TAKE_TERMINAL, *command], stdin=theirs,
      stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    self.said = ""

  def type(self, text: str) -> None:
    os.write(self._ours, text.encode())

  def wait_for(self, text: str, seconds: float = 900.0) -> None:
    """Reads until `text` was shown, behind what was waited for before."""
    end = time.monotonic() + seconds
    while text not in self.said:
      assert self._read(end), f"{text!r} did not come: {self.said[-2000:]}"
    self.said = self.said.split(text, 1)[1]

  def _read(self, end: float) -> bool:
    """Reads what comes; False once the command or the time has ended."""
    left = end - time.monotonic()
    if left <= 0 or not select.select([self._ours], [], [], left)[0]:
      return False
    try:
      self.said += os.read(self._ours, 4096).decode("utf-8", "replace")
    except OSError:
      return False
    return True

  def settle(self) -> None:
    """Reads until nothing has come for a second.

    Where Ctrl-C meets a prompt, another prompt follows; what is typed before
    it is lost.
    """
    while self._read(time.monotonic() + 1):
      pass
    self.said = ""

  def ended(self) -> int:
    """The exit status, once an empty line has ended the chat."""
    end = time.monotonic() + 300
    while self._process.poll() is None and time.monotonic() < end:
      self.type("\n")
      self.settle()
    return self._process.wait(timeout=1)


@pytest.mark.slow
def test_ctrl_c_at_random_moments_leaves_whole_turns(tmp_path):
  config = tiny_models.CONFIGS["llama"] | {"max_position_embeddings": 1024}
  base = tiny_models.write_folder(
    tmp_path / "base", config, tiny_models.weights(config))
  tree = tmp_path / "tree"
  chat = _Terminal(
    [sys.executable, "-m", "experiments.run", "--config=run",
     f"--config.base={base}", f"--tree={tree}", "--config.loop.window=256",
     "--config.loop.temperature=1.0", "--config.max_new_tokens=300"])
  moments = random.Random(7)
  chat.wait_for("> ")
  chat.type("hello\n")  # compiles
  chat.wait_for("\r\n> ")
  for i in range(20):
    chat.type(f"tell me {i}\n")
    chat.wait_for(f"tell me {i}")
    time.sleep(moments.uniform(0, 1.5))
    chat.type("\x03")
    chat.wait_for("\r\n> ")
    chat.settle()
  assert chat.ended() == 0
  with MegaContext.open(str(tree), load_base_lm(str(base))) as mc:
    tokenizer, ids = mc.lm.tokenizer, mc.tree.tokens(0, mc.cursor)
  assert _outside(tokenizer, ids) == ""
  text = tokenizer.decode(ids, keep_special=True)
  asked = [int(n) for n in re.findall(r"tell me (\d+)<", text)]
  assert asked == sorted(set(asked)) and len(asked) > 5
