"""Token stores and the resumable sampler.

A store is a folder with, per split and kind,
  SPLIT-KIND.tokens.npy   all documents' token ids, one after another
  SPLIT-KIND.offsets.npy  int64 [documents + 1], where each document starts
  SPLIT-KIND.names.json   the documents' names
opened memory-mapped. A sample is a pure function of (seed, number), so a run
resumes from its step number and a process reads only its own samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from mcjax.types import McjaxError

SPLITS = ("train", "validation", "heldout")


def default_folder() -> pathlib.Path:
  """The text store in the user's cache: $MCJAX_CACHE or ~/.cache/mcjax."""
  cache = os.environ.get("MCJAX_CACHE")
  root = pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache/mcjax"
  return root / "data"


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


def write_kind(folder: pathlib.Path, split: str, kind: str,
               documents: Iterable[tuple[str, np.ndarray]], vocab_size: int,
               fewest_tokens: int = 256) -> tuple[int, int]:
  """Stores tokenised documents; returns (documents, tokens) kept."""
  dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
  names, pieces, offsets = [], [], [0]
  for name, ids in documents:
    if len(ids) < fewest_tokens:
      continue
    names.append(name)
    pieces.append(np.asarray(ids).astype(dtype))
    offsets.append(offsets[-1] + len(ids))
  folder.mkdir(parents=True, exist_ok=True)
  stem = folder / f"{split}-{kind}"
  tokens = np.concatenate(pieces) if pieces else np.zeros((0,), dtype)
  np.save(f"{stem}.tokens.npy", tokens)
  np.save(f"{stem}.offsets.npy", np.asarray(offsets, np.int64))
  pathlib.Path(f"{stem}.names.json").write_text(json.dumps(names))
  return len(names), offsets[-1]


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
  names: tuple[str, ...]

  def document(self, index: int) -> np.ndarray:
    """Token ids [n] int32 of one document."""
    start, stop = self.offsets[index : index + 2]
    return np.asarray(self.tokens[start:stop], np.int32)


def open_split(folder, split: str, kinds: Iterable[str] | None = None
               ) -> dict[str, TokenStore]:
  """Opens {kind: TokenStore} of a split; of the default folder if "".

  Raises:
    McjaxError: nothing prepared there, or a kind is missing.
  """
  folder = pathlib.Path(folder or default_folder())
  found = sorted(p.name.removesuffix(".tokens.npy").removeprefix(f"{split}-")
                 for p in folder.glob(f"{split}-*.tokens.npy"))
  wanted = sorted(kinds) if kinds is not None else found
  missing = sorted(set(wanted) - set(found))
  if missing or not wanted:
    raise McjaxError(f"no {split} text of kind {', '.join(missing) or 'any'} "
                     f"in {folder}; run tools/prepare_data"
                     + (", or give them no weight: --config.mixture."
                        f"{missing[0]}=0" if missing else ""))
  stores = {}
  for kind in wanted:
    stem = folder / f"{split}-{kind}"
    stores[kind] = TokenStore(
      np.load(f"{stem}.tokens.npy", mmap_mode="r"),
      np.load(f"{stem}.offsets.npy"),
      tuple(json.loads(pathlib.Path(f"{stem}.names.json").read_text())))
  return stores


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


def weights_of(mixture: Mapping[str, float]) -> dict[str, float] | None:
  """The kinds of a mixture that have a weight; None for an empty mixture."""
  return {kind: w for kind, w in mixture.items() if w} or None


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
    self._orders: dict[tuple[int, int], np.ndarray] = {}
    self._sizes: dict[tuple[int, int], int] = {}
    for index in np.flatnonzero(counts):
      if not len(self._order(int(index), 0)):
        raise McjaxError(f"no document of kind {self._kinds[index]} holds "
                         f"{window} tokens")

  def _order(self, kind: int, epoch: int) -> np.ndarray:
    """Starts of all windows of a kind in this epoch's order."""
    key = (kind, epoch)
    if key not in self._orders:
      rng = np.random.default_rng([self._seed, 2, kind, epoch])
      offsets = self._stores[self._kinds[kind]].offsets
      starts = []
      for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        room = int(stop - start) - self._window
        if room >= 0:
          first = int(rng.integers(0, min(room, self._window - 1) + 1))
          starts.append(np.arange(start + first, stop - self._window + 1,
                                  self._window))
      joined = np.concatenate(starts) if starts else np.zeros((0,), np.int64)
      self._orders = {k: v for k, v in self._orders.items() if k[0] != kind}
      self._orders[key] = rng.permutation(joined)
      self._sizes[key] = len(joined)
    return self._orders[key]

  def _size(self, kind: int, epoch: int) -> int:
    """Windows of a kind in this epoch; past epochs are not ordered anew."""
    if (kind, epoch) not in self._sizes:
      self._order(kind, epoch)
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
    start = self._order(kind, epoch)[rank]
    tokens = self._stores[self._kinds[kind]].tokens
    return np.asarray(tokens[start : start + self._window], np.int32)

  def batch(self, step: int, size: int) -> np.ndarray:
    """Ids [size, window] int32 of one batch."""
    return np.stack([self.sample(step * size + i) for i in range(size)])
