"""How many nodes a search for words touches until it finds a made-up fact.

  python tools/measure_search.py --folder=/tmp/search --tokens=10000000 --seed=1

The text is drawn in passages of 512 tokens from the training store of the
default base (experiments/prepare_data.py); facts lie anywhere in it, each is
asked for by a plain question. "evidence" is the order of
`mcjax.tree.search.by_words`; "bounds" looks where the discounted bounds are
highest, as learned keys do.
"""

import json
import pathlib

from absl import app, flags
import numpy as np

from mcjax.answer.matching import Matcher, QueryWords
from mcjax.answer.words import WordTable
from mcjax.base import hub
from mcjax.base.gguf_file import GgufFile
from mcjax.base.tokenizer import Tokenizer
from mcjax.evaluation.data import planted
from mcjax.evaluation.report.writer import Table, markdown_table
from mcjax.testing.tree_reference import BASE, TinyEncoder
from mcjax.tree import lexical_keys
from mcjax.tree.search import TreeSearch, by_words
from mcjax.tree.tree import MegaContextTree

_FOLDER = flags.DEFINE_string("folder", None, "Of the trees.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 1_000_000, "Of the history.", 1)
_SEED = flags.DEFINE_integer("seed", 1, "Of text and facts.")
_NODES = flags.DEFINE_multi_integer(
  "nodes", [256, 1024, 4096, 16_384], "Nodes that a search may touch.")
_FACTS = 40
_BLOCKS = 40  # found blocks that are looked at, as by a search for 5 passages
_STEP = 1_000_000  # tokens of an append
_PASSAGE = 512
_VOCAB = 49_152


def _write(url: str, tokenizer: Tokenizer) -> list[int]:
  """Writes the history; the first block of each fact."""
  rng = np.random.default_rng(_SEED.value)
  files = sorted((hub.cache_dir() / "data").glob("train-*.tokens.npy"))
  text = np.concatenate([np.load(f) for f in files]).astype(np.int32)
  facts = [np.asarray(tokenizer.encode(f"\n{need.fact}\n"), np.int32)
           for need in planted.draw(_FACTS, _SEED.value)]
  total = _TOKENS.value
  places = np.sort(rng.integers(0, total - 100, _FACTS))
  tree = MegaContextTree.create(
    url, encoder=TinyEncoder(d_model=1), vocab_size=_VOCAB, **BASE)
  for start in range(0, total, _STEP):
    at = rng.integers(0, len(text) - _PASSAGE, -(-_STEP // _PASSAGE))
    ids = text[at[:, None] + np.arange(_PASSAGE)].reshape(-1)[:_STEP]
    for n in np.flatnonzero((places >= start) & (places < start + _STEP)):
      places[n] = min(places[n], start + len(ids) - len(facts[n]))
      ids[places[n] - start :][: len(facts[n])] = facts[n]
    tree.append(ids[: total - start])
    tree.commit()
  tree.close()
  return (places // 32).tolist()


def _search(tree: MegaContextTree, query: QueryWords, how: str) -> TreeSearch:
  words, weights = query.token_ids, query.token_weights
  if how == "evidence":
    return by_words(tree, words, weights, k=_BLOCKS)
  return TreeSearch(tree, lexical_keys.scorer(words, weights), k=_BLOCKS)


def main(argv) -> None:
  del argv
  tokenizer = Tokenizer.from_gguf(GgufFile(hub.fetch("smollm2-135m")))
  folder = pathlib.Path(_FOLDER.value) / f"{_TOKENS.value}-{_SEED.value}"
  places = folder / "places.json"
  if not places.exists():
    places.parent.mkdir(parents=True)
    places.write_text(json.dumps(_write(str(folder / "tree"), tokenizer)))
  blocks = json.loads(places.read_text())
  tree = MegaContextTree.open(
    str(folder / "tree"), encoder=None, mode="r", **BASE)
  none = np.zeros((_VOCAB, 1), np.float32)
  matcher = Matcher(tree, WordTable(tokenizer, none, none[:, 0]))
  rows = []
  for how in ("bounds", "evidence"):
    found = np.zeros(len(_NODES.value))
    for need, block in zip(
        planted.draw(_FACTS, _SEED.value), blocks, strict=True):
      ids = np.asarray(tokenizer.encode(need.question), np.int32)
      query = matcher.query(ids, np.ones(len(ids), np.float32))
      search = _search(tree, query, how)
      for at, nodes in enumerate(_NODES.value):
        if nodes - search.touched >= 32:
          search.run(nodes - search.touched)
        found[at] += any(abs(b - block) <= 1 for b, _ in search.best(_BLOCKS))
    rows.append([how, *(found / _FACTS).round(2).tolist()])
  table = Table(f"Facts found in {_TOKENS.value:,} tokens",
                ("order", *(f"{n:,} nodes" for n in _NODES.value)), rows)
  print(*markdown_table(table), sep="\n")


if __name__ == "__main__":
  app.run(main)
