"""How well gists stand in for their tokens, on text of other sources.

Every setting substitutes a stretch of a held-out document and scores the text
after it, directly or behind recent raw tokens (`recovery.py` says how and names
the variants). Losses of the controls are kept in the working folder, so that
another GistNet is measured in a fraction of the time.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from mcjax.base.load import BaseLM
from mcjax.evaluation.report.writer import Report, Table, progress
from mcjax.evaluation.systems.models import TextSettings
from mcjax.gist import encoder as gistnet
from mcjax.training.gist import recovery

_ALONE = "not measured: needs two documents"


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
  """What is measured; `quick` makes it small. See `TextSettings`
  besides.

  Attributes:
    horizons: scored tokens (H).
    blocks: L1 gists substituted.
    near: recent raw tokens, in the settings that have them.
    documents: a kind of text, at L1 directly before the scored text; an
      excerpt each. The next four are for the other settings.
    near_documents: L1 with recent tokens between.
    upper_documents: one L2 gist, directly.
    upper_near_documents: one L2 gist with recent tokens between.
    unrelated_documents: gists of another text in the window.
    unrelated_gists: how many gists of another text.
  """

  horizons: tuple[int, ...] = (32, 48, 64, 128)
  blocks: int = 8
  near: int = 256
  documents: int = 12
  near_documents: int = 5
  upper_documents: int = 6
  upper_near_documents: int = 3
  unrelated_documents: int = 4
  unrelated_gists: int = 64

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      horizons=(32, 48), documents=2, near_documents=1, upper_documents=1,
      upper_near_documents=1, unrelated_documents=1, near=32,
      unrelated_gists=8)
    return cls(**{**small, **changes})

  def arms(self) -> dict[str, tuple[recovery.Setting, int]]:
    """{name: (setting, documents a kind)} of what is compared with full."""
    h = max(self.horizons)
    lower = recovery.Setting(blocks=self.blocks, horizon=h)
    upper = recovery.Setting(blocks=1, level=2, horizon=h)
    return {
      "L1": (lower, self.documents),
      f"L1, {self.near} recent": (
        dataclasses.replace(lower, near=self.near), self.near_documents),
      "L2": (upper, self.upper_documents),
      f"L2, {self.near} recent": (
        dataclasses.replace(upper, near=self.near),
        self.upper_near_documents)}


def run(settings: Settings, folder) -> Report:
  """Measures the GistNet of `settings` and writes the report to `folder`.

  Raises:
    McjaxError: no token store, no such weights, or the base cannot be loaded.
  """
  lm, encoder, _ = settings.load()
  result = evaluate(lm, encoder, settings, pathlib.Path(folder) / "controls")
  result.write(folder)
  return result


def evaluate(lm: BaseLM, encoder: gistnet.GistEncoder, settings: Settings,
             cache: pathlib.Path | None = None) -> Report:
  """The report for one GistNet; controls are kept in `cache`."""
  s = settings
  stores = s.stores(lm)
  result = Report("substitution", dataclasses.asdict(s))
  result.add("gistnet", encoder.fingerprint)
  result.add("trained", str(encoder.trained))
  for name, (setting, documents) in s.arms().items():
    if result.tables and not recovery.holds(stores, setting.length):
      _leave_out(result, name, setting)
      continue
    progress(f"measuring {name}")
    excerpts = recovery.pick_excerpts(stores, setting.length, documents, s.seed)
    bench = recovery.Bench(lm, excerpts, setting, cache=cache)
    _compare(result, name, bench.measure(encoder), excerpts.kinds, s.horizons,
             setting)
  unrelated = recovery.Setting(
    blocks=s.unrelated_gists, near=s.near, sink=True, horizon=max(s.horizons))
  if recovery.holds(stores, unrelated.length):
    progress("measuring unrelated text")
    _unrelated(result, lm, encoder, s, unrelated, stores, cache)
  else:
    _leave_out(result, "unrelated text", unrelated)
  _cost(result, lm, encoder)
  result.notes += [
    "recovered = (drop − variant) / (drop − full) of mean losses: 1 is full "
    "context, 0 is none. Brackets: 95 % bootstrap over documents. mean, last: "
    "the mean of a span's embeddings, its last token; shuffled: the gists of "
    "another document. forwarded: tokens and gists that the base runs on for "
    "an excerpt.",
    "L1: a vector for 32 tokens, "
    f"{s.blocks} of them. L2: one vector for 1,024 tokens. Text directly "
    "after the gists is scored, or after that many recent raw tokens."]
  return result


def _leave_out(result: Report, name: str, setting: recovery.Setting) -> None:
  """Says in the report that the text is too short for a setting."""
  line = (f"{name}: not measured, no document of the store holds "
          f"{setting.length} tokens")
  progress(line)
  result.notes.append(line)


def _cost(result: Report, lm: BaseLM, encoder: gistnet.GistEncoder) -> None:
  own = gistnet.flops_per_token(encoder.config, lm.config)
  base = lm.config.flops_per_token
  layers = gistnet.params_per_layer(encoder.params)
  total = sum(int(a.size) for a in jax.tree.leaves(encoder.params))
  result.add("flops_per_token/gistnet", own, "FLOP")
  result.add("flops_per_token/base", base, "FLOP")
  result.add("flops_per_token/share", own / base)
  result.add("params", total)
  result.add("params/largest_layer", max(layers.values()))
  result.tables.append(Table(
    "Cost", ("", "GistNet", "base", "share"),
    [("FLOP per token", own, base, f"{own / base:.3%}"),
     ("parameters", total, "", ""),
     *((f"… {name}, of one layer" if name == "adapter" else f"… {name}",
        count, "", "") for name, count in layers.items())]))


def _compare(result: Report, name: str, losses, kinds, horizons,
             setting: recovery.Setting) -> None:
  """Adds a setting's figures and tables: every variant, every kind."""
  summaries = {h: recovery.summarise(recovery.over_horizon(losses, h), kinds)
               for h in horizons}
  count = next(iter(summaries.values()))["documents"]
  rows, by_kind = [], []
  for variant in recovery.VARIANTS:
    if variant not in losses:
      rows.append((variant, *[_ALONE] * len(horizons), None))
      continue
    cells = []
    for h, summary in summaries.items():
      nll = summary["nll"][variant]
      result.add(f"{name}/H={h}/nll/{variant}", nll, "nats per token")
      found = summary["recovered"].get(variant)
      text = f"{nll:.3f}"
      if found is not None:
        text += "; " + result.add_interval(
          f"{name}/H={h}/recovered/{variant}", **found)
      cells.append(text)
    forwarded = setting.forwarded(variant)
    result.add(f"{name}/forwarded/{variant}", forwarded, "tokens")
    rows.append((variant, *cells, forwarded))
  deltas = []
  for h, summary in summaries.items():
    deltas.append(result.add_interval(
      f"{name}/H={h}/delta_nll", **summary["delta"], unit="nats per token"))
  rows.append(("ΔNLL, gist − full", *deltas, None))
  result.tables.append(Table(
    f"{name}: nats per token; recovered ({count} documents)",
    ("variant", *(f"H={h}" for h in horizons), "tokens forwarded"), rows))
  for kind in sorted(set(kinds)):
    by_kind.append((kind, kinds.count(kind), *(
      result.add_interval(f"{name}/H={h}/recovered/gist/{kind}",
                          **summary["kinds"][kind]["recovered"]["gist"])
      for h, summary in summaries.items())))
  result.tables.append(Table(
    f"{name}: recovered by gists, per kind of text",
    ("kind", "documents", *(f"H={h}" for h in horizons)), by_kind))


def _unrelated(result: Report, lm: BaseLM, encoder: gistnet.GistEncoder,
               s: Settings, setting: recovery.Setting, stores, cache) -> None:
  """Loss with gists of another text in the window, less that without."""
  excerpts = recovery.pick_excerpts(
    stores, setting.length, s.unrelated_documents, s.seed)
  bench = recovery.Bench(lm, excerpts, setting, ("drop",), cache)
  losses = bench.measure(encoder)
  cells = []
  for variant in ("shuffled", "gist"):
    row = [] if variant in losses else [_ALONE] * len(s.horizons)
    for h in s.horizons if variant in losses else ():
      means = recovery.over_horizon(losses, h)
      key = "unrelated" if variant == "shuffled" else "own"
      row.append(result.add_interval(
        f"{key}_gists/H={h}/delta_nll",
        **recovery.mean_interval(means[variant] - means["drop"]),
        unit="nats per token", digits=4))
    cells.append(row)
  result.tables.append(Table(
    f"{s.unrelated_gists} gists in the window, {s.near} recent tokens: ΔNLL "
    f"with − without ({len(excerpts.ids)} documents)",
    ("gists", *(f"H={h}" for h in s.horizons)),
    [("of another text", *cells[0]), ("of the same text", *cells[1])]))
