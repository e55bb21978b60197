"""How faithful one vector for 32 tokens can be: gists fitted by gradient.

GistNet writes a gist in one cheap pass. Here the gists of an excerpt start as
GistNet's and are fitted, so that the frozen base goes on after them as it does
after their tokens: KL to its own next-token distributions, along continuations
that it samples after the raw tokens. The excerpt's true continuation takes no
part in that; it is scored as in `substitution.py`. So the reader is the same,
the vectors are as many and as wide, and what is gained is what a better writer
could gain, one that sees all blocks at once: GistNet sees one at a time, and
`blocks=1` compares the two without that. Nothing of this runs in the loop: it
costs dozens of passes of the base over the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax.base.load import BaseLM
from mcjax.evaluation.report.writer import Report, Table, make_folder, progress
from mcjax.evaluation.systems.models import TextSettings
from mcjax.gist import encoder as gistnet
from mcjax.training.gist import fitting, recovery
from mcjax.types import McjaxError


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
  """What is measured; `quick` makes it small. See `TextSettings`
  besides.

  Attributes:
    horizons: scored tokens (H).
    blocks: L1 gists substituted.
    documents: a kind of text; the excerpts of the substitution suite's L1.
    continuations: sampled from the base after the raw tokens.
    continued: tokens of each.
    batch: continuations of a gradient step, in turn.
    steps: gradient steps after which the gists are scored.
    rate: of Adam, in the units of the gists' channels.
  """

  horizons: tuple[int, ...] = (32, 48, 64, 128)
  blocks: int = 8
  documents: int = 12
  continuations: int = 12
  continued: int = 48
  batch: int = 4
  steps: tuple[int, ...] = (4, 16, 36)
  rate: float = 0.02

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      documents=1, horizons=(32, 48), continuations=2, batch=2,
      steps=(2, 4))
    return cls(**{**small, **changes})

  def __post_init__(self):
    rising = sorted(set(self.steps))
    if not rising or list(self.steps) != rising or rising[0] < 1:
      raise McjaxError("steps must be positive and rise, got "
                       f"{':'.join(map(str, self.steps))}")
    if not 0 < self.batch <= self.continuations:
      raise McjaxError(f"batch must be 1 to continuations, got {self.batch}")

  @property
  def setting(self) -> recovery.Setting:
    return recovery.Setting(blocks=self.blocks, horizon=max(self.horizons))

  def passes(self, steps: int) -> float:
    """Forward passes of the base per token of the text that `steps` cost.

    Reading and sampling, then forward and backward of every step; a backward
    pass through frozen weights counts as one forward pass.
    """
    return self.forwarded(steps) / self.setting.far

  def forwarded(self, steps: int) -> int:
    """Tokens and gists that the base runs on for `steps`, as in `passes`."""
    fitted = 2 * steps * (self.batch * self.continued + self.blocks)
    sampled = self.continuations * self.continued
    return self.setting.far + sampled + fitted


def run(settings: Settings, folder) -> Report:
  """Fits and scores the gists, and writes the report to `folder`.

  The gists of every excerpt are kept in `folder`/fitted, so a run that was
  killed goes on where it stopped.

  Raises:
    McjaxError: no token store, no such weights, or the base cannot be loaded.
  """
  s = settings
  folder = make_folder(folder)
  lm, encoder, _ = s.load()
  stores = s.stores(lm)
  excerpts = recovery.pick_excerpts(
    stores, s.setting.length, s.documents, s.seed)
  bench = recovery.Bench(lm, excerpts, s.setting, ("full", "drop"),
                         folder / "controls")
  written = bench.gists(encoder)
  fitted, kl = [], []
  for number, (ids, gists) in enumerate(zip(excerpts.ids, written)):
    progress(f"excerpt {number + 1} of {len(written)}")
    found = _kept(folder, lm, encoder, s, ids[: s.setting.far], gists)
    fitted.append(found[0])
    kl.append(found[1])
  variants = dict(bench.controls)
  variants["gist"] = bench.score(written, encoder)
  for column, steps in enumerate(s.steps):
    gists = np.stack([f[column] for f in fitted])
    variants[f"{steps} steps"] = bench.score(gists, encoder)
  variants[f"{steps} steps, shuffled"] = bench.score(
    bench.other_document(gists), encoder)
  result = Report("ceiling", dataclasses.asdict(s))
  result.add("gistnet", encoder.fingerprint)
  _report(result, s, variants, np.mean(kl, axis=0), excerpts.kinds)
  result.write(folder)
  return result


def _kept(folder: pathlib.Path, lm: BaseLM, encoder, s: Settings, far, gists):
  """`fit` of an excerpt, or what it returned in a run before."""
  key = f"{lm.fingerprint} {encoder.fingerprint} {s}"
  digest = hashlib.sha256(key.encode() + far.tobytes() + gists.tobytes())
  path = make_folder(folder / "fitted") / f"{digest.hexdigest()[:16]}.npz"
  if not path.exists():
    found = fit(lm, encoder, far, gists, s)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, gists=found[0], kl=found[1])
    partial.replace(path)
  with np.load(path) as kept:
    return kept["gists"], kept["kl"]


def fit(lm: BaseLM, encoder: gistnet.GistEncoder, far, gists, s: Settings
        ) -> tuple[np.ndarray, np.ndarray]:
  """Fits the gists of one stretch of text.

  Args:
    lm: the base.
    encoder: its GistNet, for the adapter that gists are read through.
    far: [blocks * 32] token ids.
    gists: [blocks, D] to start from.
    s: how.

  Returns:
    gists [len(s.steps), blocks, D] float32 after the steps of `s.steps`, and
    the KL in nats per token [1 + len(s.steps)] at the start and after them.
  """
  far = jnp.asarray(far, jnp.int32)
  key = jax.random.fold_in(jax.random.key(s.seed), jnp.sum(far))
  tokens, teacher = fitting.sample(
    lm.params, lm.config, far, key, s.continuations, s.continued)
  reader = encoder.reader(lm).params
  gists = jnp.asarray(gists, jnp.float32)
  moments = optax.adam(s.rate).init(gists)
  kept, kl = [], [fitting.divergence(gists, reader, lm.config, tokens, teacher)]
  for step in range(max(s.steps)):
    turn = (step * s.batch + np.arange(s.batch)) % s.continuations
    gists, moments = fitting.step(
      reader, lm.config, gists, moments, tokens[turn], teacher[turn], s.rate)
    if step + 1 in s.steps:
      kept.append(np.asarray(gists))
      kl.append(fitting.divergence(gists, reader, lm.config, tokens, teacher))
  return np.stack(kept), np.asarray(kl, np.float64)


def _report(result: Report, s: Settings, variants, kl, kinds) -> None:
  names = [v for v in variants if v not in ("full", "drop")]
  found = {h: recovery.summarise(recovery.over_horizon(variants, h), kinds)
           for h in s.horizons}
  rows: list[tuple] = []
  for name in names:
    steps = 0 if name == "gist" else int(name.split()[0])
    cells = [
      result.add_interval(
        f"H={h}/recovered/{name}", **summary["recovered"][name])
      for h, summary in found.items()]
    number = (0, *s.steps).index(steps)
    if "shuffled" in name:
      rows.append((name, None, None, None, *cells))
      continue
    cost = s.passes(steps) if steps else 0.0
    result.add(f"kl/{name}", kl[number], "nats per token")
    forwarded = s.forwarded(steps) if steps else 0
    result.add(f"passes/{name}", cost)
    result.add(f"forwarded/{name}", forwarded, "tokens")
    rows.append((name, cost, forwarded, kl[number], *cells))
  documents = found[s.horizons[0]]["documents"]
  result.tables.append(Table(
    f"Recovered by {s.blocks} gists ({documents} documents)",
    ("gists", "passes of the base", "tokens forwarded", "KL on samples",
     *(f"H={h}" for h in s.horizons)), rows))
  last = f"{max(s.steps)} steps"
  rows = []
  for kind in sorted(set(kinds)):
    cells = []
    for h, summary in found.items():
      both = [summary["kinds"][kind]["recovered"][n]["value"]
              for n in ("gist", last)]
      for name, value in zip(("gist", last), both):
        result.add(f"H={h}/recovered/{name}/{kind}", value)
      cells.append(f"{both[0]:.3f} → {both[1]:.3f}")
    rows.append((kind, *cells))
  result.tables.append(Table(
    f"Recovered per kind of text: GistNet, and after {last}",
    ("kind", *(f"H={h}" for h in s.horizons)), rows))
  result.notes += [
    "recovered = (drop − variant) / (drop − full) of mean losses on the "
    "document's own continuation. Brackets: 95 % bootstrap over documents.",
    "gist: GistNet's. n steps: fitted from there by n steps of Adam to "
    f"{s.continuations} continuations of {s.continued} tokens that the base "
    f"samples after the raw text, {s.batch} a step. shuffled: fitted on "
    "another document.",
    "Passes of the base: forward passes per token of the text that the fit "
    "costs; a backward pass counts as one."]
