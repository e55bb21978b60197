"""How well gists stand in for their tokens: `recovered` and its controls.

The measurement; `substitution.py` is the evaluation that reports it.

A stretch of a document is split into far tokens, which are substituted, `near`
raw tokens, and a horizon whose next-token loss is measured. Every variant sees
the same near and scored tokens at the positions the runtime would give them:

  full      the far tokens themselves
  drop      nothing in their place
  mean      the mean of each span's embeddings
  last      each span's last token
  shuffled  the gists of another document
  gist      the gists

recovered(x) = (drop − x) / (drop − full) of mean losses over documents; 1 is
full context and 0 is no better than dropping it. Losses are in nats a token,
token p + 1 scored from raw position p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model
from mcjax.parallel import places, processes, sharding
from mcjax.training.common.data import TokenStore
from mcjax.types import BRANCHING, McjaxError

CONTROLS = ("full", "drop", "mean", "last")
VARIANTS = CONTROLS + ("shuffled", "gist")


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to substitute: hashable, a jit static.

  Attributes:
    blocks: spans substituted, each by one gist.
    horizon: scored tokens (H).
    near: raw tokens between the gists and the scored tokens.
    level: of the gists; a span is 32**level tokens.
    sink: keep 32 tokens raw before the gists, at position 0, in every variant.
    gist_stride: positions a gist takes; it sits at their centre.
  """

  blocks: int = 8
  horizon: int = 48
  near: int = 0
  level: int = 1
  sink: bool = False
  gist_stride: int = 1

  def __post_init__(self):
    for name, lowest in (("blocks", 1), ("horizon", 1), ("near", 0),
                         ("level", 1), ("gist_stride", 1)):
      if getattr(self, name) < lowest:
        raise McjaxError(f"Setting.{name} must be ≥ {lowest}, got "
                         f"{getattr(self, name)}")

  @property
  def lead(self) -> int:
    """Raw tokens before the substituted ones."""
    return BRANCHING if self.sink else 0

  @property
  def far(self) -> int:
    """Substituted tokens."""
    return self.blocks * BRANCHING**self.level

  @property
  def length(self) -> int:
    """Tokens of one excerpt."""
    return self.lead + self.far + self.near + self.horizon + 1

  def forwarded(self, variant: str) -> int:
    """Tokens and gists that the base runs on for an excerpt in a variant."""
    middle = {"full": self.far, "drop": 0}.get(variant, self.blocks)
    return self.length - 1 - self.far + middle


@dataclasses.dataclass(frozen=True)
class Excerpts:
  """One excerpt a document: ids [n, length] int32, its kind and name."""

  ids: np.ndarray
  kinds: tuple[str, ...]
  names: tuple[str, ...]


def holds(stores: Mapping[str, TokenStore], length: int) -> bool:
  """Whether any document has so many tokens."""
  return any(np.diff(store.offsets).max(initial=0) >= length
             for store in stores.values())


def pick_excerpts(stores: Mapping[str, TokenStore], length: int,
                  per_kind: int, seed: int = 0) -> Excerpts:
  """A random excerpt of each of up to `per_kind` random documents a kind.

  Args:
    stores: {kind: TokenStore}.
    length: tokens of an excerpt.
    per_kind: documents; fewer where a kind has fewer that are long enough.
    seed: of both choices.

  Raises:
    McjaxError: no document is long enough.
  """
  ids, kinds, names = [], [], []
  for kind in sorted(stores):
    store = stores[kind]
    rng = np.random.default_rng([seed, len(kind), length])
    long_enough = np.flatnonzero(np.diff(store.offsets) >= length)
    for index in rng.permutation(long_enough)[:per_kind]:
      document = store.document(int(index))
      start = int(rng.integers(0, len(document) - length + 1))
      ids.append(document[start : start + length])
      kinds.append(kind)
      names.append(store.names[index])
  if not ids:
    raise McjaxError(f"no document holds {length} tokens")
  return Excerpts(np.stack(ids), tuple(kinds), tuple(names))


@functools.partial(jax.jit, static_argnames=("config", "setting", "variant"))
def _losses(params, config, ids, gists, setting: Setting, variant: str):
  """Losses [n, horizon] of excerpts [n, length] in one variant."""

  def one(pair):
    ids, gists = pair
    x = model.embed(params, ids, jnp.float32)
    lead, far = x[: setting.lead], x[setting.lead : setting.lead + setting.far]
    rest = x[setting.lead + setting.far : -1]
    spans = far.reshape(setting.blocks, -1, x.shape[-1])
    stride = setting.gist_stride
    if variant == "full":
      middle, step = far, 1
    elif variant == "drop":
      middle, step = far[:0], 1
    elif variant == "mean":
      middle, step = jnp.mean(spans, axis=1), stride
    elif variant == "last":
      middle, step = spans[:, -1], stride
    else:
      middle, step = gists, stride
    n = middle.shape[0]
    places = jnp.concatenate([
      jnp.arange(setting.lead, dtype=jnp.int32),
      setting.lead + jnp.arange(n, dtype=jnp.int32) * step + step // 2,
      setting.lead + n * step + jnp.arange(rest.shape[0], dtype=jnp.int32)])
    is_gist = np.zeros(places.shape, bool)
    is_gist[setting.lead : setting.lead + n] = variant == "gist"
    hidden, _, _ = model.forward(
      params, config, jnp.concatenate([lead, middle, rest]), places,
      gists=jnp.asarray(is_gist))
    return model.token_nll(
      params, hidden[-setting.horizon :], ids[-setting.horizon :])

  return jax.lax.map(one, (ids, gists))


class Bench:
  """Excerpts with their control losses, measured once for many GistNets.

  Args:
    lm: the base model.
    excerpts: of `setting.length` tokens each.
    setting: what is substituted.
    controls: which of CONTROLS to measure.
    cache: folder that keeps the controls' losses for the next GistNet.

  Attributes:
    controls: {variant: [n, horizon] losses in nats}.
  """

  def __init__(self, lm, excerpts: Excerpts, setting: Setting,
               controls: tuple[str, ...] = CONTROLS,
               cache: epath.PathLike | None = None):
    if excerpts.ids.shape[1] != setting.length:
      raise McjaxError(f"excerpts hold {excerpts.ids.shape[1]} tokens, the "
                       f"setting needs {setting.length}")
    self.excerpts = excerpts
    self.setting = setting
    self._lm = lm
    self._ids = np.asarray(excerpts.ids, np.int32)
    self._cache = None if cache is None else epath.Path(cache)
    self.controls = {v: self._control(v) for v in controls}

  def _control(self, variant: str) -> np.ndarray:
    """A control's losses, from the cache if it has them."""
    s = self.setting
    empty = np.zeros((len(self._ids), s.blocks, self._lm.config.d_model),
                     np.float32)
    if self._cache is None:
      return self._run(empty, variant)
    key = f"{self._lm.fingerprint} {self._lm.params['embed'].dtype} {s}"
    digest = hashlib.sha256(key.encode() + self.excerpts.ids.tobytes())
    path = self._cache / f"{variant}-{digest.hexdigest()[:16]}.npy"
    processes.barrier("controls")  # all find the same
    if path.exists():
      return places.load_array(path)
    found = self._run(empty, variant)
    if processes.is_first():
      places.save_array(path, found)
    return found

  def _run(self, gists: np.ndarray, variant: str, params=None) -> np.ndarray:
    return sharding.fetch(_losses(
      params or self._lm.params, self._lm.config, self._ids,
      np.asarray(gists, np.float32), self.setting, variant)).astype(np.float64)

  def gists(self, encoder) -> np.ndarray:
    """Gists [n, blocks * m, D] float32 of the far tokens, by a GistNet."""
    s = self.setting
    far = self.excerpts.ids[:, s.lead : s.lead + s.far]
    gists = encoder.encode(
      far.reshape(-1, BRANCHING), run=s.far // BRANCHING)
    for level in range(2, s.level + 1):
      children = gists.reshape(-1, BRANCHING, gists.shape[-1])
      gists = encoder.encode_gists(children, level)
    return gists.reshape(len(far), -1, gists.shape[-1])

  def other_document(self, gists: np.ndarray) -> np.ndarray:
    """Every excerpt's gists taken from the excerpt half the set away."""
    return np.roll(gists, max(1, len(gists) // 2), axis=0)

  def measure(self, encoder) -> dict[str, np.ndarray]:
    """Losses {variant: [n, horizon]} of all variants for one GistNet.

    One document alone has no "shuffled": there is no other.
    """
    gists = self.gists(encoder)
    out = dict(self.controls)
    if len(gists) > 1:
      out["shuffled"] = self.score(self.other_document(gists), encoder)
    return out | {"gist": self.score(gists, encoder)}

  def score(self, gists: np.ndarray, encoder) -> np.ndarray:
    """Losses [n, horizon] with `gists` [n, blocks * m, D] in place of text."""
    return self._run(gists, "gist", encoder.reader(self._lm).params)


def over_horizon(losses: Mapping[str, np.ndarray],
                 horizon: int | None = None) -> dict[str, np.ndarray]:
  """Mean losses {variant: [n]} over the first `horizon` scored tokens."""
  return {v: x[:, :horizon].mean(axis=1) for v, x in losses.items()}


def recovered(losses: Mapping[str, np.ndarray], variant: str = "gist",
              rows: np.ndarray | slice = slice(None)) -> float:
  """(drop − variant) / (drop − full) of mean losses over `rows`."""
  drop, full = losses["drop"][rows].mean(), losses["full"][rows].mean()
  return float((drop - losses[variant][rows].mean()) / (drop - full))


def interval(statistic: Callable[[np.ndarray], float], n: int,
             draws: int = 2000, seed: int = 0) -> tuple[float, float]:
  """95 % bootstrap interval of `statistic(rows)` over n documents."""
  rng = np.random.default_rng(seed)
  values = [statistic(rng.integers(0, n, n)) for _ in range(draws)]
  low, high = np.percentile(values, [2.5, 97.5])
  return float(low), float(high)


def mean_interval(values: np.ndarray) -> dict[str, Any]:
  """{"value", "low", "high", "n"}: mean of values [n], its `interval`, n."""
  low, high = interval(lambda rows: float(values[rows].mean()), len(values))
  return {"value": float(values.mean()), "low": low, "high": high,
          "n": len(values)}


def summarise(losses: Mapping[str, np.ndarray],
              kinds: tuple[str, ...] | None = None) -> dict:
  """Means, `recovered` with 95 % intervals, and a part for every kind.

  Returns:
    {"documents", "nll": {variant: nats}, "recovered": {variant: {"value",
    "low", "high", "n"}}, "delta": the same of gist − full in nats, "kinds":
    {kind: same}}.
  """
  n = len(losses["full"])
  report = {
    "documents": n,
    "nll": {v: float(x.mean()) for v, x in losses.items()},
    "delta": mean_interval(losses["gist"] - losses["full"]),
    "recovered": {}}
  for variant in losses:
    if variant in ("full", "drop"):
      continue
    low, high = interval(functools.partial(recovered, losses, variant), n)
    report["recovered"][variant] = {
      "value": recovered(losses, variant), "low": low, "high": high, "n": n}
  if kinds is not None:
    names = np.asarray(kinds)
    report["kinds"] = {
      kind: summarise({v: x[names == kind] for v, x in losses.items()})
      for kind in sorted(set(kinds))}
  return report
