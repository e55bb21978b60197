"""Prepares a token store: fetch or read, clean, deduplicate, tokenise, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import json
import pathlib

import numpy as np
import tqdm

from mcjax.training.common import data, sources
from mcjax.training.common.sources import Document
from mcjax.types import McjaxError

OWN = "own"  # the kind of a user's own text
_SCORED = 512  # tokens of a text kept for validation at least, half at most
_SHORT = 6000  # characters below which a user's texts are joined
_LEAST = 512  # tokens of which training and validation can both have a part
_TINY = 4096  # tokens that the tiny configurations want
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
      Without that file training prose is left out, if `kinds` does not ask
      for it.
    million_tokens: budget a kind, training and held-out alike; None has none.
    full: all packages instead of the small ones.
    kinds: only these kinds; all by default.

  Returns:
    One record {split, kind, documents, tokens} for every store written.

  Raises:
    McjaxError: a package client fails, or the books are missing.
  """
  known = sources.all_sources(books, full)
  if not kinds and not books.is_file():
    print(f"no books at {books}: training prose is left out (--books=FILE)")
    known = [s for s in known if (s.split, s.kind) != ("train", "prose")]
  unknown = sorted(set(kinds) - {s.kind for s in known})
  if unknown:
    raise McjaxError(f"unknown kind {', '.join(unknown)}; there are "
                     f"{', '.join(sorted({s.kind for s in known}))}")
  deduplicate = data.Deduplicator()
  records = []
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / "store.json").exists():  # else its kinds are all there
    (folder / data.UNFINISHED).touch()
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
  _summarise(lm, folder, records, full=full, million_tokens=million_tokens)
  (folder / data.UNFINISHED).unlink(missing_ok=True)
  return records


def prepare_own(lm, folder: pathlib.Path, documents: Iterable[Document],
                kind: str = OWN) -> list[dict]:
  """Writes a user's own texts into a store; the end of each is for validation.

  Texts are read and written one by one, short ones joined with those that
  follow, or at the end with those before. Nothing is left out but paragraphs
  that were there before. What else the store holds stays, if it was made with
  the same tokenizer.

  Args:
    lm: the base whose tokenizer is used.
    folder: where the store goes.
    documents: name and text of each.
    kind: what this text is called in mixtures.

  Returns:
    One record {split, kind, documents, tokens, texts, empty} for training and
    validation: how many texts were read, and how many of them said nothing
    that others had not.

  Raises:
    McjaxError: there is too little text to learn from, or the store is another
      tokenizer's.
  """
  before = _earlier(lm, folder)
  deduplicate, sizes = data.Deduplicator(), list[int]()

  def cleaned() -> Iterator[Document]:
    for name, text in documents:
      text = _clean(deduplicate(text))
      sizes.append(len(text))
      yield name, text

  size, total = lm.config.vocab_size, 0
  with (data.StoreWriter(folder, "train", kind, size) as train,
        data.StoreWriter(folder, "validation", kind, size) as validation):
    for name, ids in _long_enough(
        _tokenise(lm, _joined(cleaned()), kind), lm.tokenizer.encode("\n\n")):
      cut = len(ids) - min(max(len(ids) // 10, _SCORED), len(ids) // 2)
      train.add(name, ids[:cut])
      validation.add(name, ids[cut:])
      total += len(ids)
    if not (train.documents and validation.documents):
      raise McjaxError(
        f"too little text to learn from: {len(sizes)} texts hold {total} "
        f"tokens together, {_LEAST} are needed")
  records = [
    {"split": split, "kind": kind, "documents": writer.documents,
     "tokens": writer.tokens, "texts": len(sizes), "empty": sizes.count(0)}
    for split, writer in (("train", train), ("validation", validation))]
  kept = [r for r in before if r["kind"] != kind]
  _summarise(lm, folder, kept + records)
  return records


def told(records: Sequence[dict]) -> str:
  """What `prepare` or `prepare_own` has written, a line each."""
  lines = [f"{r['split']:<11}{r['kind']:<8}{r['documents']:>6} documents"
           f"{r['tokens']:>13,} tokens" for r in records]
  if "texts" in records[0]:
    own, tokens = records[0], sum(r["tokens"] for r in records)
    lines.insert(0, f"{own['texts']} texts with {tokens:,} tokens; short ones "
                 f"are joined: {own['documents']} documents")
    if own["empty"]:
      lines.append(f"{own['empty']} of the texts left out: empty, or all of it "
                   "stands in others")
    if tokens < _TINY:
      lines.append(f"little text: {_TINY:,} tokens are wanted for the "
                   "configurations that end in _tiny")
  return "\n".join(lines)


def _joined(documents: Iterable[Document]) -> Iterator[Document]:
  """Documents of at least `_SHORT` characters, as far as there are enough."""
  first, texts, size = "", [], 0
  for name, text in documents:
    if not text:
      continue
    first = first or name
    texts.append(text)
    size += len(text)
    if size >= _SHORT:
      yield first, "\n\n".join(texts)
      first, texts, size = "", [], 0
  if texts:
    yield first, "\n\n".join(texts)


def _long_enough(documents: Iterable[tuple[str, np.ndarray]],
                 between: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
  """Documents of at least `_LEAST` tokens, as far as there are enough.

  One that is shorter is joined with that before it.
  """
  held = None
  for name, ids in documents:
    if held is not None and min(len(held[1]), len(ids)) < _LEAST:
      held = held[0], np.concatenate([held[1], between, ids])
      continue
    if held is not None:
      yield held
    held = name, ids
  if held is not None:
    yield held


def _earlier(lm, folder: pathlib.Path) -> list[dict]:
  """Records of a store that is added to."""
  path = folder / "store.json"
  if not path.exists():
    return []
  summary = json.loads(path.read_text())
  if summary["tokenizer"] != lm.fingerprint:
    raise McjaxError(f"{folder} holds the tokens of {summary['base']}; use "
                     "another folder")
  return summary["stores"]


def _summarise(lm, folder: pathlib.Path, records: list[dict], **made) -> None:
  summary = {"base": lm.name, "tokenizer": lm.fingerprint, **made,
             "stores": records}
  (folder / "store.json").write_text(json.dumps(summary, indent=1))
