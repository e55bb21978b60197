"""Tokens ingested a second, against indexing for retrieval.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/ingest.py
Expected: more than ten times as fast as a MiniLM index.
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `ingest.py:quick` is small."""
  return suite("ingest", size)
