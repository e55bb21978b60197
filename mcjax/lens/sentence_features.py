"""What the choice of sentences looks at: each of them, and those beside it.

A sentence is compared with the prompt word by word, as blocks are
(`answer.matching`), by itself and with its neighbours, since an answer often
stands beside the sentence that names what is asked for ("It is led by …"). What
it alone holds, or beyond the best one, tells where several things are asked.
Nothing here knows a language or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mcjax.answer.matching import MARKS, Matcher, QueryWords, Sentence
from mcjax.answer.reading import Reader
from mcjax.answer.sentences import QUESTION_MARKS, asks
from mcjax.lens.features import LensQuery
from mcjax.types import BRANCHING

_MATCHES = ("exact", "spelling", "meaning")
_WHERE = ("own", "near", "before", "after")
_RANKED = ("share", "wanted", "exact_own", "meaning_own", "exact_near", "key",
           "joined_share", "sole")
# Of the prompt's words and those of the user's turn before it, together.
_JOINED = ("exact_own", "exact_near", "meaning_own", "share", "key")
_PLACES = {"first": 0, "behind_first": 1, "ahead_of_first": -1, "second": 2}
_LOOK = ("opening", "new", "length", "digits", "capitals", "quotes", "colon",
         "new_words", "asks", "holds_question")

NAMES = (
  *(f"{match}_{where}" for match in _MATCHES for where in _WHERE), "pairs",
  "strength", "strength_gap", "strength_before", "strength_after",
  "share", "wanted", "sole", "adds",
  *(f"{how}_{name}" for name in _RANKED for how in ("part", "gap", "rank")),
  "key", "key_before", "key_after", *(f"joined_{name}" for name in _JOINED),
  *_LOOK, "by_user", *_PLACES,
  "leans", "leans_on", "weight", "words", "top_share",
)
FEATURES = len(NAMES)
MOST = 128  # sentences that are compared at once
_BLOCKS = 24  # of the evidence, the best ones, whose sentences these are
_LEAST = -0.999  # of a score whose logit is taken
_LIKE = 0.4  # trigram likeness of words that are spelled alike


def candidates(reader: Reader, evidence: Sequence[tuple[int, float]], stop: int
               ) -> tuple[list[tuple[int, int]], np.ndarray]:
  """The sentences to choose from: S token spans in order, strengths [S].

  Args:
    reader: of the history.
    evidence: (L1 block, LensNet's score), best first.
    stop: token at which the prompt begins.
  """
  found = reader.candidates(evidence[:_BLOCKS], stop)
  spans = sorted(sorted(found, key=lambda span: -found[span])[:MOST])
  return spans, np.array([found[span] for span in spans], np.float32)


def sentence_features(matcher: Matcher, query: LensQuery,
                      spans: Sequence[tuple[int, int]],
                      strength: np.ndarray) -> np.ndarray:
  """Features [S, FEATURES] float32 of sentences; see `NAMES`.

  Args:
    matcher: of the history.
    query: what is asked.
    spans: S token spans (start, stop) in order.
    strength: [S] LensNet's score of the best block each one touches.
  """
  told = [matcher.sentence(span) for span in spans]
  keys = np.stack([one.key for one in told])
  look, beside = _looks(told, query.words.ids), _Beside(spans)
  out = joined = _matching(matcher, told, query.words, beside) | {
    "key": keys @ _unit(query.key)}
  if query.joined is not query.words:
    joined = _matching(matcher, told, query.joined, beside) | {
      "key": keys @ _unit(query.joined_key)}
  out = out | {f"joined_{name}": joined[name] for name in _JOINED}
  share, total = out["share"], query.words.weights.sum()
  logit = np.arctanh(np.clip(strength, _LEAST, -_LEAST))
  out["strength"], out["strength_gap"] = logit, logit - logit.max()
  out["strength_before"], out["strength_after"] = beside(logit + 4.0)
  out["wanted"] = share * np.maximum(strength, 0.0)
  out["key_before"], out["key_after"] = beside(out["key"])
  out |= look | _compared(out)
  blocks = np.array([a // BRANCHING for a, _ in spans], np.int64)
  blocks = np.minimum(blocks, matcher.blocks - 1)  # the newest is none yet
  out["by_user"] = matcher.marks(blocks)[:, MARKS.index("said_by_user")] > 0
  place = np.arange(len(spans)) - int(np.argmax(out["wanted"]))
  for name, at in _PLACES.items():
    out[name] = place == at
  out["leans"] = look["opening"] * (place == 1)
  out["leans_on"] = beside(share)[0] / (look["opening"] + 0.2)
  for name, value in (("weight", total / 50),
                      ("words", len(query.words.ids) / 10),
                      ("top_share", share.max())):
    out[name] = np.full(len(spans), value)
  return np.stack([np.asarray(out[name], np.float32) for name in NAMES], 1)


class _Beside:
  """Values of the sentences that end where one begins, and the reverse."""

  def __init__(self, spans: Sequence[tuple[int, int]]):
    edges = np.asarray(spans, np.int64)
    self._follows = np.concatenate(
      [[False], edges[1:, 0] == edges[:-1, 1]])

  def __call__(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those before and after each of `values` [S, …]; 0 where none is."""
    shape = (-1, *[1] * (values.ndim - 1))
    follows = self._follows.reshape(shape)
    none = np.zeros_like(values[:1])
    before = np.concatenate([none, values[:-1]]) * follows
    after = np.concatenate([(values * follows)[1:], none])
    return before, after


def _unit(key: np.ndarray) -> np.ndarray:
  key = key.astype(np.float32)
  return key / (np.linalg.norm(key) + 1e-6)


def _matching(matcher: Matcher, told: Sequence[Sentence], query: QueryWords,
              beside: _Beside) -> dict[str, np.ndarray]:
  """How much of the query's weight S sentences hold, in several senses."""
  q, weights = query.ids, query.weights
  held = {name: np.zeros((len(told), len(q)), np.float32)
          for name in (*_MATCHES, "share")}
  held["pairs"] = np.zeros((len(told), max(0, len(q) - 1)), np.float32)
  for i, one in enumerate(told):
    if len(one.words):
      for name, row in _matched(matcher.table, one.words, q).items():
        held[name][i] = row
  total, out = weights.sum() + 1e-6, {}
  for match in _MATCHES:
    here = held[match]
    before, after = beside(here)
    for where, words in zip(_WHERE, (
        here, np.maximum(np.maximum(before, after), here), before, after)):
      out[f"{match}_{where}"] = words @ weights / total
  pair = np.minimum(weights[:-1], weights[1:])
  out["pairs"] = held["pairs"] @ pair / (pair.sum() + 1e-6)
  out["share"] = held["share"] @ weights / total
  here = held["exact"]  # several things asked for stand in several sentences
  out["sole"] = here / np.maximum(here.sum(axis=0), 1.0) @ weights / total
  best = here[int(np.argmax(out["share"]))]
  out["adds"] = np.maximum(here - best, 0.0) @ weights / total
  return out


def _matched(table, words: np.ndarray, q: np.ndarray) -> dict[str, np.ndarray]:
  """How well the words [n] of a sentence match each one asked for, [Q]."""
  same = words[:, None] == q[None]
  spelling, meaning = table.spelling(words, q), table.meaning(words, q)
  exact = same.max(axis=0)
  out = {
    "exact": exact, "spelling": np.where(
      spelling > _LIKE, spelling, 0.0).max(axis=0),
    "meaning": np.maximum(exact, meaning.max(axis=0)),
    "share": np.maximum(spelling, meaning).max(axis=0)}
  if len(words) > 1 and len(q) > 1:
    out["pairs"] = (same[:-1, :-1] & same[1:, 1:]).max(axis=0)
  return out


def _looks(told: Sequence[Sentence], q: np.ndarray) -> dict[str, np.ndarray]:
  """What S sentences look like, beside the words [Q] asked for."""
  out = {name: np.zeros(len(told), np.float32) for name in _LOOK}
  for i, one in enumerate(told):
    if len(one.words):
      for name, value in _look(one, ~np.isin(one.words, q)).items():
        out[name][i] = value
  return out


def _look(told: Sentence, new: np.ndarray) -> dict[str, float]:
  """What a sentence looks like; `new` [n] bool: words not in the prompt."""
  text, counts = told.text, told.counts
  words = text.split()
  return {
    "opening": counts[0], "new": (counts * new).sum(),
    "length": np.log2(1 + told.tokens) / 8,
    "digits": any(c.isdigit() for c in text),
    "capitals": sum(w[:1].isupper() for w in words) / max(1, len(words)),
    "quotes": '"' in text, "colon": text.rstrip().endswith(":"),
    "new_words": new.mean(), "asks": asks(text),
    "holds_question": any(mark in text for mark in QUESTION_MARKS)}


def _compared(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Each of `_RANKED` beside the best sentence's, and its rank."""
  out = {}
  for name in _RANKED:
    value = np.asarray(values[name])
    rank = np.empty(len(value))
    rank[np.argsort(-value, kind="stable")] = np.arange(len(value))
    out[f"part_{name}"] = value / (value.max() + 1e-3)
    out[f"gap_{name}"] = value - value.max()
    out[f"rank_{name}"] = 1.0 / (1.0 + rank / 2.0)
  return out
