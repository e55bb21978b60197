"""Whether the LM should attend to the gists in its window, in the loop.

Held-out documents are ingested, and the text after them is scored by the loop
with gists in view ("visible"), with gist slots hidden from attention
("masked"); the policy's focus is the same in both.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any
import uuid

import numpy as np

from mcjax.config import Config
from mcjax.evaluation.report.writer import Report, Table, progress
from mcjax.evaluation.systems.models import Models, TextSettings
from mcjax.training.gist import recovery


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
  """What is measured; `quick` makes it small. See `TextSettings`
  besides.

  Attributes:
    documents: a kind of text.
    history: tokens ingested.
    scored: tokens scored after them.
    window: W.
    policy: of the loop.
  """

  documents: int = 3
  history: int = 8192
  scored: int = 128
  window: int = 1024
  policy: str = "recency"

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      documents=1, history=1024, scored=32, window=512)
    return cls(**{**small, **changes})


def run(settings: Settings, folder) -> Report:
  """Measures and writes the report to `folder`.

  Raises:
    McjaxError: no token store, no such weights, or the base cannot be loaded.
  """
  s = settings
  models = s.load()
  stores, encoder = s.stores(models.lm), models.encoder
  excerpts = recovery.pick_excerpts(
    stores, s.history + s.scored, s.documents, s.seed)
  result = Report("visible", dataclasses.asdict(s))
  result.add("gistnet", encoder.fingerprint)
  result.add("trained", str(encoder.trained))
  losses: dict[str, list[float]] = {"masked": [], "visible": []}
  forwarded: dict[str, list[int]] = {arm: [] for arm in losses}
  for number, ids in enumerate(excerpts.ids):
    progress(f"document {number + 1} of {len(excerpts.ids)}")
    for arm, found in losses.items():
      loss, count = _score(models, s, arm, ids)
      found.append(loss)
      forwarded[arm].append(count)
  _report(result, {k: np.array(v) for k, v in losses.items()}, excerpts.kinds)
  for arm, counts in forwarded.items():
    result.add(f"{arm}/tokens forwarded", float(np.mean(counts)), "tokens")
  result.tables.append(Table(
    "Tokens that the base runs on for a document", ("arm", "tokens forwarded"),
    [[arm, float(np.mean(counts))] for arm, counts in forwarded.items()]))
  result.write(pathlib.Path(folder))
  return result


def _score(models: Models, s: Settings, arm: str, ids) -> tuple[float, int]:
  """Mean loss of the end of `ids` [history + scored] in nats; tokens run."""
  config = Config(window=s.window, policy=s.policy, gist_attention=arm)
  url = f"memory://{uuid.uuid4()}/tree"
  decode = models.lm.tokenizer.decode
  with models.create(url, config) as mc:
    mc.ingest(decode(ids[: s.history].tolist()))
    before = mc._loop.context.tokens_run
    loss = mc.score(decode(ids[s.history :].tolist())).mean()
    return float(loss), mc._loop.context.tokens_run - before


def _report(result: Report, losses, kinds) -> None:
  difference = losses["visible"] - losses["masked"]
  rows = []
  for kind in ("all", *sorted(set(kinds))):
    chosen = np.array([kind in ("all", k) for k in kinds])
    means = {k: float(v[chosen].mean()) for k, v in losses.items()}
    for arm, mean in means.items():
      result.add(f"{kind}/nll/{arm}", mean, "nats per token")
    rows.append((
      kind, int(chosen.sum()), means["masked"], means["visible"],
      result.add_interval(
        f"{kind}/visible_minus_masked",
        **recovery.mean_interval(difference[chosen]),
        unit="nats per token", digits=4)))
  result.tables.append(Table(
    "Mean loss in the loop, nats per token",
    ("kind", "documents", "masked", "visible", "visible − masked"), rows))
  result.notes.append("Brackets: 95 % bootstrap over documents. Below zero, "
                      "showing gists helps.")
