"""Every suite, one report.

Command, ten hours and more on 2 CPU cores; it goes on where it stopped:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/all.py --workdir=runs/all
With fewer samples, an hour or two (docs/results has what came out):
    --config=experiments/configs/evaluate/all.py:short --workdir=runs/short
"""

from ml_collections import config_dict

from experiments.configs.evaluate import suite
from mcjax.evaluation import runner

# Fewer samples than a suite's own configuration asks for.
_SHORT = {
  "overhead": dict(histories=(8192, 1 << 20), repeats=3, torch=False),
  "ttft": dict(lengths=(8192, 131072), repeats=3, torch_limit=0),
  "ingest": dict(repeats=3, batches=(8,)),
  "drift": dict(steps=(16, 64), probes=16, refresh=(0,)),
  "substitution": {},
  "ceiling": dict(documents=2, steps=(4, 16), continuations=8),
  "visible": {},
  "focus": dict(parts=("planted",), policies=("lensnet", "similarity"),
                needs=12, retriever=False),
  "questions": dict(
    questions=12, others=4, systems=(
      "megacontext", "megacontext/similarity", "megacontext/recency", "bm25",
      "dense", "fusion", "sink", "evidence", "evidence+turn", "none")),
  "needle": dict(samples=1, lengths=(32768,), depths=(0.1, 0.5, 0.9), systems=(
    "megacontext", "bm25", "dense", "fusion", "sink", "evidence")),
  "perplexity": dict(windows=(256, 512, 1024), gists=(4, 16),
                     fitted_windows=(256,), steps=8, documents=2, systems=(
                       "sink", "megacontext", "bm25", "none")),
  "session": dict(systems=("megacontext", "megacontext/recency", "bm25", "sink",
                           "evidence")),
}


def get_config(size=""):
  """The settings of each suite under its name.

  base, dtype, gistnet and lensnet are those of all suites. `all.py:quick` is
  small, `all.py:short` has fewer samples.
  """
  c = config_dict.ConfigDict()
  c.suite = "all"
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.gistnet = ""
  c.lensnet = ""
  c.only = ()  # names of suites; all if empty
  c.suites = config_dict.ConfigDict()
  for name in runner.NAMES:
    one = suite(name, "" if size == "short" else size)
    if name == "questions":  # reported, so of the test split
      one.split = "test"
    if size == "short":
      one.update(_SHORT[name])
    del one.suite
    for shared in ("base", "dtype", "gistnet", "lensnet"):
      one[shared] = c.get_ref(shared)
    c.suites[name] = one
  return c
