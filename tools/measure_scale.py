"""How a history grows: up to 100M tokens behind a tiny base.

  python tools/measure_scale.py --folder=/tmp/scale --tokens=100000000

The text is drawn in passages of 512 tokens from the training store of the
default base (experiments/prepare_data.py), so that words are as frequent as in
real text; made-up facts lie anywhere in it. Gists are plain means of embeddings
and the tree is filled directly: what is measured is the storage and the loop,
not GistNet. At 1M, 10M, ... tokens the history is closed, opened in a process
of its own, asked for a fact, and searched for all of them.
"""

import dataclasses
import json
import multiprocessing
import pathlib
import shutil
import time

from absl import app, flags
import numpy as np

from mcjax.base import hub
from mcjax.base.gguf_file import GgufFile
from mcjax.base.tokenizer import Tokenizer
from mcjax.config import Config
from mcjax.evaluation.data import planted
from mcjax.evaluation.report.writer import Table, markdown_table
from mcjax.gist.encoder import GistEncoder
from mcjax.runtime.megacontext import MegaContext
from mcjax.runtime.telemetry import peak_memory_mib
from mcjax.testing import tiny_base

_FOLDER = flags.DEFINE_string("folder", None, "Written anew.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 100_000_000, "Of the whole history.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the text and the facts.")
_STEP = 1_000_000  # tokens of an ingest, and of the first look
_PASSAGE = 512
_VOCAB = 49_152
_CONFIG = Config(window=512, policy="similarity", chat="plain")
_FACTS = 40  # in the tokens that are new at each look


class _Means(GistEncoder):
  """The mean of what it stands for."""

  def encode_tokens(self, token_ids):
    return np.concatenate([
      self._table[token_ids[a : a + 2048]].mean(1)
      for a in range(0, len(token_ids), 2048)])

  def encode_gists(self, gists, level):
    return gists.mean(1)

  def of(self, table: np.ndarray) -> "_Means":
    self._table = table
    return self


def _models():
  tokenizer = Tokenizer.from_gguf(GgufFile(hub.fetch("smollm2-135m")))
  lm = tiny_base.make_lm(vocab=_VOCAB)
  lm = dataclasses.replace(lm, tokenizer=tokenizer)
  plain = tiny_base.gistnet(lm)
  means = _Means(lm, plain.params, plain.config, trained=False)
  return lm, means.of(np.asarray(lm.params["embed"]))


def _passages(rng: np.random.Generator):
  """Endless batches of token ids [_STEP] of real passages in new order."""
  files = sorted((hub.cache_dir() / "data").glob("train-*.tokens.npy"))
  text = np.concatenate([np.load(f) for f in files]).astype(np.int32)
  while True:
    start = rng.integers(0, len(text) - _PASSAGE, -(-_STEP // _PASSAGE))
    yield text[start[:, None] + np.arange(_PASSAGE)].reshape(-1)[:_STEP]


def _ingest(url: str, first: int, last: int, seed: int, pipe) -> None:
  """Appends tokens [first, last) drawn by a seed; sends seconds and MiB."""
  lm, gistnet = _models()
  rng = np.random.default_rng(seed)
  batches = _passages(rng)
  facts = {int(at): lm.tokenizer.encode(f"\n{need.fact}\n")
           for at, need in zip(rng.integers(first, last - 100, _FACTS),
                               planted.draw(_FACTS, seed), strict=True)}
  opener = MegaContext.open if first else MegaContext.create
  with opener(url, lm, _CONFIG, gistnet) as mc:
    seconds = -time.perf_counter()
    while mc.cursor < last:
      ids = next(batches)
      for at, fact in facts.items():
        start = min(at - mc.cursor, _STEP - len(fact))
        if 0 <= start and at < mc.cursor + _STEP:
          ids[start : start + len(fact)] = fact
      mc.tree.append(ids)
      mc.tree.commit()
    seconds += time.perf_counter()
  pipe.send((seconds, time.process_time(), peak_memory_mib()))


def _look(url: str, seeds: list[int], pipe) -> None:
  """Opens, asks twice (the first time compiles); sends what it took."""
  needs = [need for s in seeds for need in planted.draw(_FACTS, s)]
  lm, gistnet = _models()
  before = peak_memory_mib()
  begin = time.perf_counter()
  mc = MegaContext.open(url, lm, _CONFIG, gistnet)
  opened = time.perf_counter() - begin
  for _ in range(2):
    mc.telemetry.counters.clear()
    said = mc.generate(needs[0].question, 32, remember=False)
  counters, steps = mc.telemetry.counters, max(
    1, mc.telemetry.counters["refocus_steps"])
  refocus = [sum(r["seconds"].get(k, 0) for k in ("lens", "allocate", "fetch"))
             for r in mc.telemetry.records if r["kind"] == "refocus"][-steps:]
  pipe.send({
    "open_s": opened,
    "memory_mib": peak_memory_mib() - before,
    "first_token_s": said.first_token_seconds,
    "refocus_ms": 1e3 * float(np.median(refocus)) if refocus else 0.0,
    "nodes": counters["nodes_touched"] / steps,
    "bytes": counters["bytes_read"] / steps,
    **_search(mc, needs),
    "stored": mc.tree.nbytes_on_disk(),
    "levels": mc.tree.top_level,
  })
  mc.close()


def _search(mc: MegaContext, needs: list[planted.Need]) -> dict[str, float]:
  """How many facts are the best passages for their questions."""
  begin, found = time.process_time(), []
  reads = mc.tree.reads["keys"]
  for need in needs:
    found.append(any(need.fact in passage.text
                     for passage in mc.search(need.question, k=5)))
  return {
    "search_cpu_s": (time.process_time() - begin) / len(needs),
    "search_nodes": (mc.tree.reads["keys"] - reads) / len(needs),
    "facts": len(needs), "found": float(np.mean(found)),
  }


def _apart(work, *args):
  """What `work` sends, run in a process of its own."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  process = context.Process(target=work, args=(*args, theirs))
  process.start()
  theirs.close()
  sent = ours.recv()
  process.join()
  return sent


def main(argv) -> None:
  del argv
  folder = pathlib.Path(_FOLDER.value)
  shutil.rmtree(folder / "tree", ignore_errors=True)
  folder.mkdir(parents=True, exist_ok=True)
  url, cursor, rows = str(folder / "tree"), 0, []
  seeds: list[int] = []
  stops = [_STEP]
  while stops[-1] < _TOKENS.value:
    stops.append(min(10 * stops[-1], _TOKENS.value))
  for stop in stops:
    seeds.append(1000 * _SEED.value + len(seeds))
    seconds, cpu, peak = _apart(_ingest, url, cursor, stop, seeds[-1])
    seen = _apart(_look, url, seeds)
    files = sum(p.is_file() for p in pathlib.Path(url).rglob("*"))
    stored = seen.pop("stored")
    rows.append({
      "tokens": stop, "tokens_per_s": (stop - cursor) / seconds,
      "ingest_cpu_s": cpu, "ingest_peak_mib": peak, "files": files,
      "bytes_per_token": sum(stored.values()) / stop, **seen,
      "bytes_by_kind": {k: round(v / stop, 3) for k, v in stored.items()},
    })
    print(json.dumps(rows[-1]), flush=True)
    cursor = stop
  (folder / "results.json").write_text(json.dumps(rows, indent=1))
  names = [n for n in rows[0] if n != "bytes_by_kind"]
  table = Table("How a history grows", tuple(names),
                [[row[n] for n in names] for row in rows])
  print(*markdown_table(table), sep="\n")


if __name__ == "__main__":
  app.run(main)
