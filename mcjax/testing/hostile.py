"""Files that mean harm, and what it costs to be told so.

Each of `CASES` writes a folder and gives a call that must raise a McjaxError of
one line which names the file and what is wrong in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import struct
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from mcjax.base.load import load_base_lm
from mcjax.base.tokenizer import Tokenizer
from mcjax.gist.encoder import load_gistnet
from mcjax.gist.weights import save_gistnet
from mcjax.testing import corruption, tiny_base, tiny_models
from mcjax.testing import tree_reference as reference
from mcjax.tree.store import (
  COPY_KEY,
  RECORD_KEY,
  decode_record,
  encode_record,
)
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_CONFIG = {**tiny_models.CONFIGS["llama"], "num_hidden_layers": 1}
_LOOPS = "".join(f"{{% for a{i} in range(99999) %}}" for i in range(6))
_DOUBLING = (
  "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
  "{% set ns.x = ns.x ~ ns.x %}{% endfor %}")
_VALUES = (None, "x", -1, 0, 1 << 70, 1.5, float("nan"), True, [], {}, [1, 2],
           "[[" * 10)


class Case(NamedTuple):
  """One of them.

  Attributes:
    name: for a table.
    words: that the message must hold: the file and the field.
    prepare: writes into a folder; what it returns must raise.
  """

  name: str
  words: tuple[str, ...]
  prepare: Callable[[pathlib.Path], Callable[[], object]]


def _template(source: str) -> Callable[[pathlib.Path], Callable[[], object]]:
  def prepare(folder: pathlib.Path) -> Callable[[], object]:
    place = _base(folder)
    (place / "chat_template.jinja").write_text(source)

    def use() -> object:
      tokenizer: Tokenizer = load_base_lm(place).tokenizer
      return tokenizer.chat([{"role": "user", "content": "x"}])

    return use

  return prepare


def _base(folder: pathlib.Path, **changes) -> pathlib.Path:
  place = tiny_models.write_folder(
    folder / "base", _CONFIG, tiny_models.weights(_CONFIG))
  fields = json.loads((place / "config.json").read_text()) | changes
  (place / "config.json").write_text(json.dumps(fields))
  return place


def _setting(**changes) -> Callable[[pathlib.Path], Callable[[], object]]:
  def prepare(folder: pathlib.Path) -> Callable[[], object]:
    place = _base(folder, **changes)
    return lambda: load_base_lm(place)

  return prepare


def _gguf(folder: pathlib.Path) -> Callable[[], object]:
  """One field, an array of 2**60 numbers."""
  key, path = b"a.b", folder / "m.gguf"
  path.write_bytes(
    b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    + struct.pack("<IIQ", 9, 4, 1 << 60))
  return lambda: load_base_lm(path)


def _gistnet(folder: pathlib.Path) -> Callable[[], object]:
  lm, path = tiny_base.make_lm(), folder / "gistnet.safetensors"
  encoder = tiny_base.gistnet(lm)
  params = jax.tree.map(lambda x: np.full_like(x, np.nan), encoder.params)
  save_gistnet(path, params, encoder.config, {})
  return lambda: load_gistnet(lm, path)


def make_tree(folder: pathlib.Path) -> pathlib.Path:
  """A small tree with every part; its folder."""
  place = folder / "t"
  tree = reference.create(place, keyer=reference.TinyKeyer())
  tree.append(reference.random_ids(3000))
  tree.journal.add("note", text="x")
  tree.record_access(np.array([1]), np.array([1]))
  tree.commit({"a": 1})
  tree.close()
  return place


def read_tree(place: pathlib.Path) -> object:
  """Opens a tree and reads all of it, its statistics too."""
  tree = open_tree(place)
  for level in range(tree.top_level + 1):
    tree.access_counts(level, 0, tree.num_nodes(level))
  return corruption.contents(tree)


def load_good(folder: pathlib.Path) -> None:
  """Does with good files what the cases do with theirs."""
  tokenizer: Tokenizer = load_base_lm(_base(folder)).tokenizer
  tokenizer.chat([{"role": "user", "content": "x"}])
  read_tree(make_tree(folder))
  lm, path = tiny_base.make_lm(), folder / "gistnet.safetensors"
  encoder = tiny_base.gistnet(lm)
  save_gistnet(path, encoder.params, encoder.config, {})
  load_gistnet(lm, path)


def open_tree(place: pathlib.Path) -> MegaContextTree:
  return reference.peek(place, keyer=reference.TinyKeyer())


def _pipe(folder: pathlib.Path) -> Callable[[], object]:
  place = make_tree(folder)
  (place / RECORD_KEY).unlink()
  os.mkfifo(place / RECORD_KEY)
  return lambda: open_tree(place)


def _version_0(folder: pathlib.Path) -> Callable[[], object]:
  place = make_tree(folder)
  write_record(place, record_of(place) | {"version": 0})
  return lambda: open_tree(place)


def record_of(place: pathlib.Path) -> dict[str, Any]:
  return decode_record((place / RECORD_KEY).read_bytes(), str(place))


def write_record(place: pathlib.Path, record: dict) -> None:
  """Writes a record and its copy, with a checksum that is right."""
  for key in (RECORD_KEY, COPY_KEY):
    (place / key).write_bytes(encode_record(record))


CASES = (
  Case("a template of nested ranges", ("chat template",), _template(
    _LOOPS + "x" + "{% endfor %}" * 6)),
  Case("a template that doubles a text", ("chat template",), _template(
    _DOUBLING)),
  Case("a template that divides by 0", ("chat template", "zero"), _template(
    "{{ 1 / 0 }}")),
  Case("a gguf array of 2**60", ("m.gguf", "a.b"), _gguf),
  Case("a pipe as record", (RECORD_KEY, "pipe"), _pipe),
  Case("a record of version 0", ("record", "'version'"), _version_0),
  Case("1e9 layers", ("config.json", "num_hidden_layers"), _setting(
    num_hidden_layers=10**9)),
  Case("rms_norm_eps NaN", ("config.json", "rms_norm_eps"), _setting(
    rms_norm_eps=float("nan"))),
  Case("rope_theta 0", ("config.json", "rope_theta"), _setting(rope_theta=0)),
  Case("GistNet weights that are NaN", ("gistnet.safetensors", "NaN"),
       _gistnet),
)


def malformed(record: dict) -> Iterator[tuple[str, dict]]:
  """Every field of a commit record lost, or replaced by what it may not be.

  Yields:
    The field's name with its value, and the record.
  """
  for path in _fields(record):
    for value in (*_VALUES, ...):
      bad = json.loads(json.dumps(record))
      within = bad
      for key in path[:-1]:
        within = within[key]
      if value is ...:
        del within[path[-1]]
      else:
        within[path[-1]] = value
      if bad != record:
        yield f"{'.'.join(path)} {value!r:.20}", bad


def _fields(value: dict, before: tuple[str, ...] = ()
            ) -> Iterator[tuple[str, ...]]:
  for key, inner in value.items():
    yield (*before, key)
    if isinstance(inner, dict):
      yield from _fields(inner, (*before, key))


@dataclasses.dataclass(frozen=True)
class Cost:
  """What it took to be told.

  Attributes:
    told: the message.
    seconds: of wall-clock time.
    cpu: seconds of CPU time, of this process and of those it started.
    mib: more memory than before, or that of a process it started.
  """

  told: str
  seconds: float
  cpu: float
  mib: float


def cost(call: Callable[[], object]) -> Cost:
  """Calls what must be refused; only on Linux, best in a fresh process.

  Raises:
    AssertionError: it is not, or not in one line.
  """
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
  before, begin, cpu = _status("VmRSS"), time.perf_counter(), _cpu()
  with _watching() as largest:
    try:
      call()
    except McjaxError as error:
      told = str(error)
      assert "\n" not in told and len(told) < 1000, told
    else:
      raise AssertionError("it is not refused")
    seconds, cpu = time.perf_counter() - begin, _cpu() - cpu
  return Cost(told, seconds, cpu, max(*largest, _status("VmHWM") - before))


def _cpu() -> float:
  """Seconds of CPU time of this process and of its children that ended."""
  return sum(os.times()[:4])


@contextlib.contextmanager
def _watching() -> Iterator[list[float]]:
  """Looks at this process's children; their peaks so far, MiB."""
  found, over = [0.0], threading.Event()

  def look() -> None:
    own = pathlib.Path("/proc/self/cmdline").read_bytes()
    while not over.wait(0.02):
      for child in _children():
        with contextlib.suppress(OSError, StopIteration):  # it is gone
          if pathlib.Path(f"/proc/{child}/cmdline").read_bytes() != own:
            found.append(_status("VmHWM", child))  # else not yet its own

  thread = threading.Thread(target=look)
  thread.start()
  try:
    yield found
  finally:
    over.set()
    thread.join()


def _children() -> list[str]:
  found = []
  for place in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # it is gone
      parent = place.read_text().rpartition(") ")[2].split()[1]
      if int(parent) == os.getpid():
        found.append(place.parent.name)
  return found


def _status(name: str, pid: str = "self") -> float:
  """A line of a process's status, MiB."""
  lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  line = next(line for line in lines if line.startswith(name + ":"))
  return int(line.split()[1]) / 1024
