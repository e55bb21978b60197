"""The cache of a MegaContext: exact, spliced, refreshed."""

from marks import further
import numpy as np
import pytest
from runtime_cases import WINDOW, window_logits

from mcjax.testing import tiny_base
from mcjax.types import BRANCHING


def exercise(mc):
  """Ingests and answers, with logits in between, so that caches fill."""
  for seed, count in enumerate((300, 250, 40, 900, 10)):
    mc.ingest(tiny_base.text(count, seed))
    yield "ingest"
    mc.generate(tiny_base.text(20 + seed, 50 + seed), max_new_tokens=70)
    yield "generate"


@pytest.mark.parametrize("policy, visible, seen", [
  ("random", "visible", 3),
  *further(("similarity", "masked", 0), ("random", "masked", 0),
           ("random", "visible", 0),
           ("similarity", "visible", 0), ("recency", "visible", 0),
           ("recency", "masked", 0)),
])
def test_exact_mode_is_a_plain_forward_of_the_window(
    make, policy, visible, seen):
  mc = make(kv="exact", policy=policy, gist_attention=visible, gists_seen=seen,
            gist_stride=3)
  for what in exercise(mc):
    np.testing.assert_allclose(
      mc.next_logits(), window_logits(mc), atol=1e-4, err_msg=what
    )
  assert mc.telemetry.counters["edits"] > 0


def test_splicing_is_exact_while_nothing_is_edited(make):
  mc = make(kv="splice", policy="recency")
  mc.ingest(tiny_base.text(100))
  for seed in range(3):
    mc.generate(tiny_base.text(9, seed), max_new_tokens=70)
    np.testing.assert_allclose(mc.next_logits(), window_logits(mc), atol=1e-4)
  assert mc.telemetry.counters["edits"] == 0


def test_splicing_is_not_exact_after_edits_but_refreshing_is(make):
  spliced = make(policy="random", gist_attention="visible")
  fresh = make(policy="random", gist_attention="visible", refresh_every=1)
  error = []
  for mc in (spliced, fresh):
    for _ in exercise(mc):
      pass
    mc.generate("x", max_new_tokens=65)
    error.append(np.abs(mc.next_logits() - window_logits(mc)).max())
  assert error[0] > 1e-3 > 1e-4 > error[1]


def test_a_refresh_without_edits_changes_nothing(make):
  said = []
  for every in (0, 1, 3):
    mc = make(policy="recency", refresh_every=every)
    mc.ingest(tiny_base.text(100))
    said.append(mc.generate("and", max_new_tokens=200).token_ids.tolist())
    assert mc.telemetry.counters["edits"] == 0
  assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("visible", ["visible", *further("masked")])
def test_a_refocus_runs_the_lm_on_what_changed_only(make, visible):
  mc = make(policy="random", gist_attention=visible, settle_steps=0)
  mc.ingest(tiny_base.text(3000))
  mc.next_logits()
  before = dict(mc.telemetry.counters)
  mc.generate("go", max_new_tokens=1500)
  spent = {k: n - before.get(k, 0) for k, n in mc.telemetry.counters.items()}
  refocused = [
    r for r in mc.telemetry.records if r["kind"] == "refocus" and r["edits"]
    and r["cursor"] % BRANCHING == 0  # what the rest changes is run later
  ]
  gists = sum(action < 0 and visible == "visible"
              for r in refocused for action, *_ in r["edits"])
  # Expands of L2 swap in 32 gists, which are not run where they are masked.
  opened = sum(
    action > 0 and (level == 1 or visible == "visible")
    for r in refocused for action, level, _ in r["edits"]
  )
  assert spent["expands"] > 2 and spent["collapses"] > 2
  # The newest token runs again where it has something new to see.
  again = sum(
    visible == "visible" or any(a > 0 and l == 1 for a, l, _ in r["edits"])
    for r in refocused
  )
  assert spent["splice_tokens"] == BRANCHING * opened + gists + again
  assert spent["splice_tokens"] < 0.2 * len(refocused) * WINDOW


@pytest.mark.parametrize("visible", ["masked", "visible"])
def test_a_collapse_runs_the_lm_only_where_its_gist_is_seen(make, visible):
  mc = make(policy="recency", gist_attention=visible)
  mc.ingest(tiny_base.text(3000))
  mc.generate("go", max_new_tokens=400)
  count = mc.telemetry.counters
  assert count["collapses"] > 3 and count["expands"] == 0
  assert bool(count["splice_tokens"]) == (visible == "visible")
