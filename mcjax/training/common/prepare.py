"""Prepares the token store: fetch, clean, deduplicate, tokenise, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import json
import pathlib

import numpy as np
import tqdm

from mcjax.training.common import data, sources
from mcjax.types import McjaxError

CHARS_PER_TOKEN = 3.7  # to turn a token budget into characters


def _clean(text: str) -> str:
  return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def _take(source: sources.Source, folder: pathlib.Path, characters: float,
          deduplicate: data.Deduplicator) -> list[tuple[str, str]]:
  """Deduplicated documents of a source up to a budget of characters."""
  documents = data.shuffled(source.read(folder / "downloads"))
  if source.kind == "chat":  # its greetings repeat by nature
    deduplicate = data.Deduplicator()
  kept, total = [], 0
  longest = max(characters / 40, 60_000)
  for name, text in documents:
    if total >= characters:
      break
    text = _clean(deduplicate(text))[: int(longest)]
    if text:
      kept.append((name, text))
      total += len(text)
  return kept


def _tokenise(lm, documents, label: str) -> Iterator[tuple[str, np.ndarray]]:
  for name, text in tqdm.tqdm(documents, desc=label, unit="doc"):
    yield name, lm.tokenizer.encode(text)


def prepare(lm, folder: pathlib.Path, books: pathlib.Path,
            million_tokens: float | None, full: bool = False,
            kinds: Sequence[str] = ()) -> list[dict]:
  """Writes every split of the store for the tokenizer of `lm`.

  Args:
    lm: the base whose tokenizer is used.
    folder: where the store goes; downloads are kept below it.
    books: the public-domain books, one JSON object a line, xz-compressed.
    million_tokens: budget a kind, training and held-out alike; None has none.
    full: all packages instead of the small ones.
    kinds: only these kinds; all by default.

  Returns:
    One record {split, kind, documents, tokens} for every store written.

  Raises:
    McjaxError: a package client fails, or the books are missing.
  """
  known = sources.all_sources(books, full)
  unknown = sorted(set(kinds) - {s.kind for s in known})
  if unknown:
    raise McjaxError(f"unknown kind {', '.join(unknown)}; there are "
                     f"{', '.join(sorted({s.kind for s in known}))}")
  deduplicate = data.Deduplicator()
  records = []
  budget = np.inf
  if million_tokens is not None:
    budget = million_tokens * 1e6 * CHARS_PER_TOKEN
  for source in known:
    if kinds and source.kind not in kinds:
      continue
    documents = _take(source, folder, budget, deduplicate)
    splits = {source.split: documents}
    if source.split == "train":
      splits = {
        "train": [d for d in documents if not data.validation_document(d[0])],
        "validation": [d for d in documents if data.validation_document(d[0])]}
    for split, part in splits.items():
      count, tokens = data.write_kind(
        folder, split, source.kind,
        _tokenise(lm, part, f"{split} {source.kind}"), lm.config.vocab_size)
      records.append({"split": split, "kind": source.kind,
                      "documents": count, "tokens": tokens})
  summary = {"base": lm.name, "tokenizer": lm.fingerprint, "full": full,
             "million_tokens": million_tokens, "stores": records}
  (folder / "store.json").write_text(json.dumps(summary, indent=1))
  return records
