"""Token stores and the resumable sampler.

A store is a folder with, per split and kind,
  SPLIT-KIND.tokens.npy   all documents' token ids, one after another
  SPLIT-KIND.offsets.npy  int64 [documents + 1], where each document starts
  SPLIT-KIND.names.json   the documents' names
opened memory-mapped. A sample is a pure function of (seed, number), so a run
resumes from its step number and a process reads only its own samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import struct
import sys

import numpy as np

from mcjax.base import hub
from mcjax.parallel import places
from mcjax.types import McjaxError

SPLITS = ("train", "validation", "heldout")
UNFINISHED = "unfinished"  # file in a store whose kinds are not all there yet
_TRIED = 512  # tokens by which a tokenizer is told from another


def default_folder() -> pathlib.Path:
  """The text store in the user's cache, see `hub.cache_dir`."""
  return hub.cache_dir() / "data"


def _stable_hash(text: str) -> int:
  digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8)
  return int.from_bytes(digest.digest(), "little")


class Deduplicator:
  """Drops paragraphs of ≥ `shortest` characters seen before, in any split."""

  def __init__(self, shortest: int = 120):
    self._seen: set[int] = set()
    self._shortest = shortest
    self.dropped = 0

  def __call__(self, text: str) -> str:
    """`text` without the paragraphs already passed through this object."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
      normal = " ".join(paragraph.lower().split())
      if len(normal) >= self._shortest:
        key = _stable_hash(normal)
        if key in self._seen:
          self.dropped += 1
          continue
        self._seen.add(key)
      if normal:
        kept.append(paragraph)
    return "\n\n".join(kept)


def validation_document(name: str) -> bool:
  """Whether a training source's document is kept for choices (one in 12)."""
  return _stable_hash(name) % 12 == 0


def shuffled(documents: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
  """Documents in an order that depends on their names only."""
  return sorted(documents, key=lambda d: _stable_hash("order" + d[0]))


class StoreWriter:
  """Writes one split and kind of a store, document by document, as a block.

  Nothing but names and document starts is kept in memory. The files appear
  under their names when the block ends without an error.

  Args:
    folder: of the store; created if missing.
    split, kind: which part of it.
    vocab_size: of the tokenizer, for the width of a token.
    fewest_tokens: shorter documents are passed over.

  Attributes:
    documents, tokens: written so far.
  """

  def __init__(self, folder: pathlib.Path, split: str, kind: str,
               vocab_size: int, fewest_tokens: int = 256):
    if not re.fullmatch(r"\w+", kind):
      raise McjaxError(f"a kind of text is a word, got {kind!r}")
    folder.mkdir(parents=True, exist_ok=True)
    self._stem = folder / f"{split}-{kind}"
    self._partial = pathlib.Path(f"{self._stem}.tokens.partial")
    self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    self._fewest = fewest_tokens
    self._names: list[str] = []
    self._offsets = [0]

  @property
  def documents(self) -> int:
    return len(self._names)

  @property
  def tokens(self) -> int:
    return self._offsets[-1]

  def __enter__(self):
    self._file = self._partial.open("wb")
    self._header()
    return self

  def _header(self) -> None:
    """NumPy's header, which has the same size for any number of tokens."""
    self._file.seek(0)
    np.lib.format.write_array_header_1_0(self._file, {
      "descr": self._dtype.str, "fortran_order": False,
      "shape": (self.tokens,)})

  def add(self, name: str, ids: np.ndarray) -> None:
    """Appends a document of token ids [n]."""
    if len(ids) < self._fewest:
      return
    self._file.write(np.asarray(ids).astype(self._dtype).tobytes())
    self._names.append(name)
    self._offsets.append(self.tokens + len(ids))

  def __exit__(self, kind, *unused):
    if kind is None:
      self._header()
    self._file.close()
    if kind is not None:
      self._partial.unlink()
      return
    np.save(f"{self._stem}.offsets.npy", np.asarray(self._offsets, np.int64))
    pathlib.Path(f"{self._stem}.names.json").write_text(
      json.dumps(self._names))
    self._partial.replace(f"{self._stem}.tokens.npy")


def write_kind(folder: pathlib.Path, split: str, kind: str,
               documents: Iterable[tuple[str, np.ndarray]], vocab_size: int,
               fewest_tokens: int = 256) -> tuple[int, int]:
  """Stores tokenised documents; returns (documents, tokens) kept."""
  with StoreWriter(folder, split, kind, vocab_size, fewest_tokens) as writer:
    for name, ids in documents:
      writer.add(name, ids)
  return writer.documents, writer.tokens


class Names(Sequence):
  """The documents' names, read from their file when one is asked for."""

  def __init__(self, path: pathlib.Path, count: int):
    self._path, self._count = path, count

  @functools.cached_property
  def _all(self) -> list[str]:
    return json.loads(self._path.read_text())

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index):
    return self._all[index]


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """The documents of one split and kind, memory-mapped.

  Attributes:
    tokens: [total] uint16 or uint32.
    offsets: [documents + 1] int64.
    names: one name a document.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  names: Sequence[str]

  def document(self, index: int) -> np.ndarray:
    """Token ids [n] int32 of one document."""
    start, stop = self.offsets[index : index + 2]
    return np.asarray(self.tokens[start:stop], np.int32)


def open_split(folder, split: str, kinds: Iterable[str] | None = None,
               lm=None) -> dict[str, TokenStore]:
  """Opens {kind: TokenStore} of a split.

  Args:
    folder: of the store; the default one if "".
    split: one of SPLITS.
    kinds: which; all by default.
    lm: the base that is to read them; not looked at if None.

  Raises:
    McjaxError: nothing prepared there, or not to its end, a kind is missing, or
      the tokens are another tokenizer's.
  """
  folder = places.local(folder or default_folder())
  if (folder / UNFINISHED).exists():
    raise McjaxError(
      f"the text in {folder} is not complete: it is being prepared, or that "
      "was stopped; run tools/prepare_data to its end")
  found = _kinds(folder, split)
  wanted = sorted(kinds) if kinds is not None else found
  missing = sorted(set(wanted) - set(found))
  if missing or not wanted:
    what = f"text of kind {', '.join(missing)}" if missing else "text"
    raise McjaxError(
      f"no {split} {what} in {folder}; run tools/prepare_data, for your own "
      "text python -m experiments.prepare_data --files=FOLDER --config.folder="
      f"{folder}" + (", or name the kinds there are: --config.kinds="
                     + ",".join(found) if missing and found else ""))
  stores = {}
  for kind in wanted:
    stem = folder / f"{split}-{kind}"
    offsets = np.load(f"{stem}.offsets.npy", mmap_mode="r")
    stores[kind] = TokenStore(
      np.load(f"{stem}.tokens.npy", mmap_mode="r"), offsets,
      Names(pathlib.Path(f"{stem}.names.json"), len(offsets) - 1))
  if lm is not None:
    _check_tokenizer(folder, stores, lm)
  return stores


def _check_tokenizer(folder: pathlib.Path, stores: Mapping[str, TokenStore],
                     lm) -> None:
  """Refuses a store of another tokenizer's tokens."""
  made = folder / "store.json"
  known = json.loads(made.read_text("utf-8")) if made.exists() else {}
  if known.get("tokenizer", lm.fingerprint) != lm.fingerprint and not _reads(
      lm, next(iter(stores.values())).document(0)[:_TRIED]):
    raise McjaxError(
      f"{folder} was tokenised for {known['base']}, not for {lm.name}: run "
      f"tools/prepare_data --base={lm.name} --folder=DIR and give "
      "--config.data=DIR")


def _reads(lm, ids: np.ndarray) -> bool:
  """Whether the base's tokenizer makes about the same tokens of a text."""
  if ids.max() >= lm.config.vocab_size:
    return False
  again = lm.tokenizer.encode(lm.tokenizer.decode(ids.tolist()))
  return float(np.isin(np.unique(ids), again).mean()) > 0.9


def fingerprint(stores: Mapping[str, TokenStore],
                weights: Mapping[str, float] | None = None) -> dict:
  """Names data and mixture in a checkpoint, without reading all of it.

  Returns:
    {"kinds": {kind: hex digest of sizes, document starts and a sample of the
    tokens}, "mixture": {kind: weight}}.
  """
  digests = {}
  for kind, store in sorted(stores.items()):
    digest = hashlib.blake2b(digest_size=8)
    for values in (store.tokens, store.offsets):
      digest.update(str(len(values)).encode())
      step = max(1, len(values) // 4096)
      digest.update(np.asarray(values[::step], "<i8").tobytes())
    digests[kind] = digest.hexdigest()
  weights = weights or {k: 1.0 for k in stores}
  return {"kinds": digests,
          "mixture": {k: float(v) for k, v in sorted(weights.items())}}


def open_mixture(folder, mixture: Mapping[str, float],
                 kinds: Sequence[str] = (), lm=None
                 ) -> tuple[dict[str, TokenStore], dict[str, float]]:
  """The training split's stores, and the weights of their kinds.

  Args:
    folder: of the store; the default one if "".
    mixture: {kind: weight}; kinds of weight 0 are left out. Where it is empty,
      or the store holds none of its kinds, all kinds of the store have equal
      weights.
    kinds: instead of `mixture`, "KIND" or "KIND:WEIGHT" each.
    lm: as in `open_split`.

  Raises:
    McjaxError: as `open_split`; or a weight is no number.
  """
  wanted = {k: float(w) for k, w in mixture.items() if w}
  if kinds:
    wanted = dict(map(_weight, kinds))
  else:
    held = _kinds(places.local(folder or default_folder()), "train")
    if held and wanted and not set(held) & set(wanted):
      print(f"text: {', '.join(held)}, in equal shares (config.kinds weighs "
            "them)", file=sys.stderr)
      wanted = {}
  stores = open_split(folder, "train", wanted or None, lm)
  return stores, wanted or {kind: 1.0 for kind in stores}


def _weight(text: str) -> tuple[str, float]:
  kind, colon, weight = text.partition(":")
  try:
    return kind, float(weight) if colon else 1.0
  except ValueError:
    raise McjaxError(f"config.kinds: the weight of {kind} is {weight!r}"
                     ) from None


def _kinds(folder: pathlib.Path, split: str) -> list[str]:
  """The kinds of text of a split, sorted."""
  return sorted(p.name.removesuffix(".tokens.npy").removeprefix(f"{split}-")
                for p in folder.glob(f"{split}-*.tokens.npy"))


@dataclasses.dataclass(frozen=True)
class _Epoch:
  """How the documents of a kind are cut into windows, and their order.

  Attributes:
    firsts: [documents] int64, where a document's first window starts.
    until: [documents] int64, windows of the documents up to and with this.
    window: tokens of a window.
    key: of the order.
  """

  firsts: np.ndarray
  until: np.ndarray
  window: int
  key: int

  @property
  def size(self) -> int:
    return int(self.until[-1]) if len(self.until) else 0

  def start(self, rank: int) -> int:
    """First token of the window that comes at `rank` of the random order."""
    place = _shuffled_place(rank, self.size, self.key)
    document = int(np.searchsorted(self.until, place, side="right"))
    before = int(self.until[document - 1]) if document else 0
    return int(self.firsts[document]) + (place - before) * self.window


def _cut(offsets: np.ndarray, window: int, seed: list[int]) -> _Epoch:
  """Cuts all documents at once, each from a random place on."""
  rng = np.random.default_rng(seed)
  starts = np.asarray(offsets[:-1], np.int64)
  room = np.diff(offsets) - window
  first = rng.integers(0, np.clip(room, 0, window - 1) + 1)
  count = np.where(room >= 0, (room - first) // window + 1, 0)
  return _Epoch(starts + first, np.cumsum(count), window,
                int(rng.integers(1 << 62)))


def _shuffled_place(rank: int, size: int, key: int) -> int:
  """Where `rank` comes in a random order of `size` places, without the order.

  A Feistel network permutes the least power of four that is not below `size`;
  what falls outside is sent through again (Black and Rogaway 2002).
  """
  half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
  mask = (1 << half) - 1
  while True:
    left, right = rank >> half, rank & mask
    for turn in range(4):
      mixed = hashlib.blake2b(
        struct.pack("<QQQ", key, turn, right), digest_size=8).digest()
      left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
    rank = left << half | right
    if rank < size:
      return rank


class WindowSampler:
  """Windows of tokens from a weighted mixture of kinds, without state.

  Windows never cross documents. Every kind runs through its windows in a
  random order, once an epoch, with another offset into the documents at every
  epoch. Sample number g is a function of (seed, g) alone.

  Args:
    stores: {kind: TokenStore}.
    window: tokens per sample.
    weights: {kind: weight}; equal if None.
    seed: of the order.

  Raises:
    McjaxError: a kind has no document of `window` tokens, or weights name an
      unknown kind.
  """

  _CYCLE = 100

  def __init__(self, stores: Mapping[str, TokenStore], window: int,
               weights: Mapping[str, float] | None = None, seed: int = 0):
    self._stores = dict(stores)
    self._kinds = sorted(stores)
    self._window = window
    self._seed = seed
    weights = dict(weights) if weights else {k: 1.0 for k in self._kinds}
    unknown = sorted(set(weights) - set(self._kinds))
    if unknown:
      raise McjaxError(f"mixture weights name unknown kinds: {unknown}")
    share = np.array([weights.get(k, 0.0) for k in self._kinds])
    if share.min() < 0 or share.sum() <= 0:
      raise McjaxError("mixture weights must be ≥ 0 and sum to more than 0")
    counts = np.floor(share / share.sum() * self._CYCLE).astype(int)
    counts[np.argmax(share)] += self._CYCLE - counts.sum()
    cycle = np.repeat(np.arange(len(self._kinds)), counts)
    self._cycle = np.random.default_rng([seed, 1]).permutation(cycle)
    self._counts = counts
    self._epochs: dict[int, tuple[int, _Epoch]] = {}
    self._sizes: dict[tuple[int, int], int] = {}
    for index in np.flatnonzero(counts):
      if not self._size(int(index), 0):
        raise McjaxError(f"no document of kind {self._kinds[index]} holds "
                         f"{window} tokens")

  def _epoch(self, kind: int, epoch: int) -> _Epoch:
    """How a kind is cut in an epoch; the newest one of each kind is kept."""
    known = self._epochs.get(kind)
    if known is None or known[0] != epoch:
      cut = _cut(self._stores[self._kinds[kind]].offsets, self._window,
                 [self._seed, 2, kind, epoch])
      known = self._epochs[kind] = epoch, cut
      self._sizes[kind, epoch] = cut.size
    return known[1]

  def _size(self, kind: int, epoch: int) -> int:
    """Windows of a kind in this epoch; past epochs are not cut anew."""
    if (kind, epoch) not in self._sizes:
      self._epoch(kind, epoch)
    return self._sizes[kind, epoch]

  def sample(self, number: int) -> np.ndarray:
    """Token ids [window] int32 of sample `number`."""
    cycle, place = divmod(number, self._CYCLE)
    kind = int(self._cycle[place])
    rank = cycle * int(self._counts[kind]) + int(
      np.sum(self._cycle[:place] == kind))
    epoch = 0
    while rank >= self._size(kind, epoch):  # epochs differ a little in size
      rank -= self._size(kind, epoch)
      epoch += 1
    start = self._epoch(kind, epoch).start(rank)
    tokens = self._stores[self._kinds[kind]].tokens
    return np.asarray(tokens[start : start + self._window], np.int32)

  def batch(self, step: int, size: int) -> np.ndarray:
    """Ids [size, window] int32 of one batch."""
    return np.stack([self.sample(step * size + i) for i in range(size)])
