"""Telemetry: counters, records, their signs, and the JSONL file."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mcjax import Config, McjaxError, MegaContext
from mcjax.runtime.telemetry import Telemetry, peak_memory_mib
from mcjax.testing import tiny_base


def test_phases_add_up_also_when_they_fail():
  telemetry = Telemetry()
  for _ in range(2):
    with telemetry.phase("splice"):
      pass
  first = telemetry.seconds["splice"]
  with pytest.raises(RuntimeError), telemetry.phase("splice"):
    raise RuntimeError
  assert 0 < first < telemetry.seconds["splice"]
  lap = telemetry.lap()
  assert lap["splice"] == pytest.approx(telemetry.seconds["splice"], abs=1e-6)
  assert telemetry.lap()["splice"] == 0


def test_swap_rate_is_edits_per_refocus_step():
  telemetry = Telemetry()
  assert telemetry.swap_rate == 0
  telemetry.count("refocus_steps", 8)
  telemetry.count("edits", 6)
  assert telemetry.swap_rate == 0.75
  assert telemetry.summary()["swap_rate"] == 0.75


def test_only_the_newest_records_are_kept():
  telemetry = Telemetry()
  for i in range(400):
    telemetry.record("refocus", step=i)
  assert [r["step"] for r in telemetry.records] == list(range(144, 400))


def test_a_file_that_cannot_be_opened(tmp_path):
  with pytest.raises(McjaxError, match=r"config\.telemetry_path .*directory"):
    Telemetry(str(tmp_path))


def test_peak_memory_is_what_the_kernel_says():
  status = pathlib.Path("/proc/self/status")
  assert 10 < peak_memory_mib() < 1e6
  if status.exists():
    line = next(l for l in status.read_text().splitlines() if "VmHWM" in l)
    assert peak_memory_mib() == pytest.approx(int(line.split()[1]) / 1024, 0.02)


@pytest.fixture
def run(tiny_lm, tiny_gistnet, tmp_path):
  """A MegaContext that has done a bit of everything, and its JSONL."""
  path = tmp_path / "telemetry.jsonl"
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(window=512, policy="random", recent_tokens=64, gists_per_level=8,
           gist_attention="visible", threshold=0.05, delta_nll_every=2,
           telemetry_path=str(path)),
    gistnet=tiny_gistnet,
  )
  mc.ingest(tiny_base.text(3000))
  mc.generate("go on", max_new_tokens=320)
  mc.score(tiny_base.text(100, 1))
  mc.close()
  return mc, [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_holds_every_record(run):
  mc, lines = run
  assert lines == json.loads(json.dumps(list(mc.telemetry.records)))
  kinds = [r["kind"] for r in lines]
  assert {"ingest", "generate", "refocus", "delta_nll", "score"} == set(kinds)
  times = [r["time"] for r in lines]
  assert times == sorted(times)
  ingest = lines[0]
  assert ingest["tokens"] == ingest["cursor"] == 3001


def test_refocus_records_add_up_to_the_counters(run):
  mc, lines = run
  steps = [r for r in lines if r["kind"] == "refocus"]
  count = mc.telemetry.counters
  assert len(steps) == count["refocus_steps"]
  edits = [edit for r in steps for edit in r["edits"]]
  assert len(edits) == count["edits"] == count["expands"] + count["collapses"]
  assert sum(action == 1 for action, *_ in edits) == count["expands"]
  assert all(len(r["edits"]) <= 4 for r in steps)
  assert all(0 < r["utilisation"] <= 1 for r in steps)
  for r in steps:
    assert sum(r["residency"]) == pytest.approx(1, abs=1e-4)
  tokens = [r["lm_tokens"] for r in steps]
  assert tokens == sorted(tokens)


def test_lm_and_decoded_tokens_are_all_that_was_run(tiny_lm, tiny_gistnet):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(window=512, policy="random", recent_tokens=64, gists_per_level=8,
           gist_attention="visible"),
    gistnet=tiny_gistnet,
  )
  mc.ingest(tiny_base.text(3000))
  mc.generate("go on", max_new_tokens=200)
  mc.score(tiny_base.text(100, 1))
  count = mc.telemetry.counters
  assert count["lm_tokens"] + count["decoded_tokens"] == (
    mc._loop.context.tokens_run
  )
  assert 0 < count["splice_tokens"] < count["lm_tokens"]
  assert count["gist_blocks"] == (mc.cursor + 100) // 32
  mc.close()


def test_accesses_are_kept_in_the_tree(run, tiny_lm, tiny_gistnet):
  mc, lines = run
  again = MegaContext.open(mc.tree.url, tiny_lm, gistnet=tiny_gistnet)
  expected = {}
  last = max(i for i, r in enumerate(lines) if r["kind"] == "generate")
  steps = [r for r in lines[:last] if r["kind"] == "refocus"]
  for r in steps:
    for action, level, index in r["edits"]:
      nodes = (
        [(level - 1, 32 * index + k) for k in range(32)] if action == 1
        else [(level, index)]
      )
      for node in nodes:
        expected[node] = expected.get(node, 0) + 1
  assert expected
  for (level, index), times in expected.items():
    assert again.tree.access_counts(level, index, index + 1) == [times]
  again.close()


def test_delta_nll_is_after_minus_before(tiny_lm, tiny_gistnet, monkeypatch):
  """Lower is better: an edit that helps has a negative change."""
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(window=512, policy="random", recent_tokens=64, gists_per_level=8,
           gist_attention="visible", threshold=0.05, delta_nll_every=1),
    gistnet=tiny_gistnet,
  )
  mc.ingest(tiny_base.text(3000))
  context, probed = mc._loop.context, []
  probe = context.probe_nll

  def spy(ids):
    probed.append(probe(ids))
    return probed[-1]

  monkeypatch.setattr(context, "probe_nll", spy)
  mc.generate("go", max_new_tokens=70)
  deltas = [r for r in mc.telemetry.records if r["kind"] == "delta_nll"]
  assert len(deltas) >= 1 and len(probed) >= 2
  assert deltas[0]["horizon"] == 32
  assert deltas[0]["nats"] == pytest.approx(
    float(np.mean(probed[1] - probed[0])), rel=1e-5
  )
  assert abs(deltas[0]["nats"]) > 1e-4
  mc.close()


def test_a_childs_peak_is_its_own():
  held = np.ones((700 << 20) // 8)
  code = ("from mcjax.runtime.telemetry import peak_memory_mib as peak; "
          "print(peak())")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                        text=True, check=True)
  assert float(done.stdout) < 700 < peak_memory_mib()
  assert held.nbytes
