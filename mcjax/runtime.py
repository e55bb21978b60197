"""The loop: ingest -> gist -> assemble -> score -> allocate -> decode.

`MegaContext` is the public object: an unbounded history on disk behind a
frozen language model with a window of fixed size.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Callable

import jax
import numpy as np

from mcjax import focus_allocator, invariants, policies
from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.context_lm import ContextLM
from mcjax.gistnet import BATCH_SIZES, GistEncoder, load_gistnet
from mcjax.lensnet_policy import load_lensnet
from mcjax.oracle import Oracle
from mcjax.telemetry import Telemetry, compile_count
from mcjax.tree import MegaContextTree
from mcjax.types import BRANCHING, Entry, McjaxError
from mcjax.working_context import (
  COLLAPSE, EXPAND, WorkingContext, cold_start,
)

_QUERY = 64  # newest tokens that act as the query where there is no prompt
_SLICE = 1 << 16  # tokens per tree append during a long ingest


@dataclasses.dataclass(frozen=True)
class IngestStats:
  """What one `ingest` did."""

  tokens: int
  seconds: float
  cursor: int

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds if self.seconds else float("inf")


@dataclasses.dataclass(frozen=True)
class Generation:
  """What one `generate` said.

  Attributes:
    text: the answer, without the stop token.
    token_ids: [n] int32, the stop token included.
    prompt_tokens: tokens the prompt took in the history.
    seconds: wall clock, the prompt included.
    first_token_seconds: until the first block of the answer began.
  """

  text: str
  token_ids: np.ndarray
  prompt_tokens: int
  seconds: float
  first_token_seconds: float


class MegaContext:
  """A frozen LM with an unbounded history; use `create` or `open`."""

  def __init__(self, tree: MegaContextTree, lm: BaseLM, config: Config,
               encoder: GistEncoder):
    self.tree = tree
    self.lm = lm
    self.config = config
    self._encoder = encoder
    show = config.gist_attention == "visible" or (
      config.gist_attention == "auto" and encoder.trained
    )
    self._context = ContextLM(lm, config, show)
    self._policy = _make_policy(config, lm, encoder)
    self.telemetry = Telemetry(config.telemetry_path)
    self._key = jax.random.key(config.seed)
    self._step = 0
    self._warm = False
    self._closed = False
    self._set_query(np.zeros(0, np.int32), np.zeros(0, np.float32))
    self._restore_focus()

  # --- opening and closing ------------------------------------------------

  @classmethod
  def create(cls, url: str, lm: BaseLM, config: Config | None = None,
             gistnet: GistEncoder | None = None) -> MegaContext:
    """Starts an empty history at `url`.

    Args:
      url: path, file://, memory://, gs:// or s3://.
      lm: the frozen base.
      config: of the loop; defaults.
      gistnet: the compressor; the shipped one by default.

    Raises:
      McjaxError: a tree is there already, or the place cannot be written.
    """
    config = config or Config()
    encoder = gistnet or load_gistnet(lm)
    _check_window(lm, config)
    tree = MegaContextTree.create(
      url, base_fingerprint=lm.fingerprint, base_name=lm.name,
      encoder=encoder, vocab_size=lm.config.vocab_size,
    )
    tree.commit({"config": dataclasses.asdict(config)})
    return cls(tree, lm, config, encoder)

  @classmethod
  def open(cls, url: str, lm: BaseLM, config: Config | None = None,
           gistnet: GistEncoder | None = None) -> MegaContext:
    """Resumes a history with the focus and configuration it was closed with.

    Raises:
      McjaxError: no tree is there, or another base LM or GistNet wrote it.
    """
    encoder = gistnet or load_gistnet(lm)
    tree = MegaContextTree.open(
      url, base_fingerprint=lm.fingerprint, base_name=lm.name, encoder=encoder,
    )
    if config is None:
      known = {f.name for f in dataclasses.fields(Config)}
      saved = tree.extra.get("config", {})
      config = Config(**{k: v for k, v in saved.items() if k in known})
    _check_window(lm, config)
    return cls(tree, lm, config, encoder)

  def close(self) -> None:
    """Commits and releases the tree; the object is of no use afterwards."""
    if not self._closed:
      self._commit()
      self.tree.close()
      self.telemetry.close()
      self._closed = True

  def __enter__(self) -> MegaContext:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _commit(self) -> None:
    self.tree.commit({
      "config": dataclasses.asdict(self.config),
      "focus": _focus_runs(self._context.window),
      "step": self._step,
    })

  def _restore_focus(self) -> None:
    runs = self.tree.extra.get("focus")
    self._step = int(self.tree.extra.get("step", 0))
    nodes = [(l, i + k) for l, i, n, _ in runs or () for k in range(n)]
    window = self._context.window
    if runs is None or len(nodes) > self.config.window - BRANCHING:
      if self.tree.cursor:
        self._cold_start(self.config.recent_tokens)
      return
    window.retile(nodes)
    window.entries.action[:] = [a for *_, n, a in runs for _ in range(n)]
    if window.cursor != self.tree.cursor:
      self._cold_start(self.config.recent_tokens)

  # --- public work --------------------------------------------------------

  def ingest(self, text: str,
             progress: Callable[[int, int], None] | None = None) -> IngestStats:
    """Adds text to the history.

    Args:
      text: any length.
      progress: called with tokens done and tokens in all.

    Raises:
      McjaxError: the text is empty or not a string.
    """
    self._check_text(text, "text")
    begin = time.perf_counter()
    ids = self._with_bos(self.lm.tokenizer.encode(text))
    window, free = self._context.window, self._context.window.free
    for a in range(0, len(ids), _SLICE):
      with self.telemetry.phase("gist"):
        self.tree.append(ids[a : a + _SLICE])
      if progress is not None:
        progress(min(a + _SLICE, len(ids)), len(ids))
    self._count_blocks(len(ids))
    if len(ids) <= free - BRANCHING:
      window.append_tokens(window.take_slots(len(ids)))
    else:
      self._cold_start(self.config.recent_tokens)
    self._recent_query()
    self._check()
    self._commit()
    seconds = time.perf_counter() - begin
    self.telemetry.record(
      "ingest", tokens=len(ids), seconds=seconds, cursor=self.tree.cursor
    )
    return IngestStats(len(ids), seconds, self.tree.cursor)

  def generate(self, prompt: str, max_new_tokens: int = 64,
               on_text: Callable[[str], None] | None = None) -> Generation:
    """Answers a prompt; prompt and answer join the history.

    Args:
      prompt: wrapped in the base's chat template where it has one; one that
        is longer than the window is ingested like any text.
      max_new_tokens: at most this many.
      on_text: called with the whole answer so far after every block.

    Raises:
      McjaxError: empty prompt or max_new_tokens < 1.
    """
    self._check_text(prompt, "prompt")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
      raise McjaxError(
        f"max_new_tokens must be a whole number >= 1, got {max_new_tokens}"
      )
    begin = time.perf_counter()
    self._warm_up()
    ids, closing = self._prompt(prompt)
    self._append(ids)
    self._settle()
    self._sync()
    first = time.perf_counter() - begin
    out: list[int] = []
    stopped = False
    while len(out) < max_new_tokens and not stopped:
      ids_out, stopped = self._decode_block(max_new_tokens - len(out))
      out.extend(ids_out.tolist())
      if on_text is not None:
        on_text(self._answer(out, stopped))
    self._append(_unsaid(closing, out[-1:] if stopped else []))
    self._commit()
    seconds = time.perf_counter() - begin
    self.telemetry.record(
      "generate", tokens=len(out), prompt_tokens=len(ids), seconds=seconds,
      first_token_seconds=first,
    )
    return Generation(
      self._answer(out, stopped), np.array(out, np.int32), len(ids), seconds,
      first,
    )

  def score(self, text: str) -> np.ndarray:
    """NLL per token of `text` in nats, teacher-forced through the loop.

    The text is not remembered: tree, focus and cache are as before. The very
    first token of an empty history has no prediction and is NaN.

    Raises:
      McjaxError: the text is empty or not a string.
    """
    self._check_text(text, "text")
    self._warm_up()
    ids = self.lm.tokenizer.encode(text)
    query, step = (self._query, self._query_weights, self._query_start), \
        self._step
    snapshot = self._context.snapshot()
    try:
      with self.tree.transient():
        return self._score(ids)
    finally:
      self._context.restore(snapshot)
      self._query, self._query_weights, self._query_start = query
      self._step = step

  def focus(self) -> list[Entry]:
    """The entries (level, start, stop) that tile [0, cursor)."""
    return self._context.window.focus()

  def next_logits(self) -> np.ndarray:
    """Logits [V] float32 for the token after the history as focused now.

    Raises:
      McjaxError: the history is empty.
    """
    if not self.tree.cursor:
      raise McjaxError("the history is empty: nothing to predict from")
    self._warm_up()
    self._sync()
    return self._context.logits()

  @property
  def cursor(self) -> int:
    """Tokens in the history."""
    return self.tree.cursor

  # --- the loop -----------------------------------------------------------

  def _decode_block(self, wanted: int) -> tuple[np.ndarray, bool]:
    limit = min(BRANCHING - self.tree.cursor % BRANCHING, wanted)
    if self._make_room(limit):
      self._sync()
    with self.telemetry.phase("decode"):
      self._key, key = jax.random.split(self._key)
      ids, stopped = self._context.decode(limit, self.config.temperature, key)
    self.telemetry.count("decoded_tokens", len(ids))
    with self.telemetry.phase("gist"):
      self.tree.append(ids)
    self._count_blocks(len(ids))
    if not stopped and len(ids) < wanted and self._due():
      self._refocus_and_sync()
    self._check()
    return ids, stopped

  def _score(self, ids: np.ndarray) -> np.ndarray:
    out = []
    for a, b in _blocks(self.tree.cursor, len(ids)):
      chunk = ids[a:b]
      self._append(chunk)
      self._sync(renew=len(chunk) + 1)
      out.append(self._context.newest_nll(chunk))
      if self._due() and b < len(ids):
        self._recent_query()
        self._refocus(need=BRANCHING, continuation=ids[b:])
    return np.concatenate(out)

  def _refocus_and_sync(self) -> None:
    """A refocus between decoded blocks; the LM catches up where it changed."""
    every = self.config.delta_nll_every
    probe = every and (self._step + 1) % every == 0
    newest = self.tree.tokens(
      max(0, self.tree.cursor - BRANCHING), self.tree.cursor
    )
    before = self._context.probe_nll(newest) if probe else None
    if not self._refocus(need=BRANCHING):
      return
    spliced = self._context.tokens_run
    self._sync()
    self.telemetry.count("splice_tokens", self._context.tokens_run - spliced)
    if probe:
      change = self._context.probe_nll(newest) - before
      self.telemetry.record(
        "delta_nll", step=self._step, horizon=len(newest),
        nats=float(np.nanmean(change)),
      )

  def _due(self) -> bool:
    return self.tree.cursor % self.config.refocus_every == 0

  def _append(self, ids: np.ndarray) -> None:
    """Adds tokens to the tree and, at L0 as far as they fit, to the window."""
    if not len(ids):
      return
    count = len(ids)
    fits = count <= self.config.window // 4 and self.tree.cursor > 0
    if fits:
      self._make_room(count)
    with self.telemetry.phase("gist"):
      self.tree.append(ids)
    self._count_blocks(count)
    window = self._context.window
    if count <= window.free:
      window.append_tokens(window.take_slots(count))
    else:
      half = self.config.window // (2 * BRANCHING) * BRANCHING
      self._cold_start(max(self.config.recent_tokens, min(count, half)))

  def _settle(self) -> None:
    """Refocuses until nothing changes, at most `settle_steps` times."""
    for _ in range(self.config.settle_steps):
      if not self._refocus(need=BRANCHING):
        break

  def _make_room(self, need: int) -> int:
    """Collapses until `need` slots are free; returns the edits made."""
    edits = 0
    while self._context.window.free < need:
      made = self._refocus(need=need)
      edits += made
      if not made:
        self._cold_start(self.config.recent_tokens)
        edits += 1
    return edits

  def _refocus(self, need: int, continuation=None) -> int:
    """One refocus step: score, allocate, apply; the LM runs at `_sync`."""
    window, config = self._context.window, self.config
    view = policies.FocusView(
      entries=window.entries, tree=self.tree, query_ids=self._query,
      query_weights=self._query_weights, query_start=self._query_start,
      step=self._step, context_lm=self._context, continuation=continuation,
      pressure=window.free < need + config.max_edits * (BRANCHING - 1),
    )
    with self.telemetry.phase("lens"):
      scores = self._policy.score(view)
    with self.telemetry.phase("allocate"):
      legal = focus_allocator.legal_edits(
        window, step=self._step, cooldown=config.cooldown,
        sink=config.sink_tokens, protect=config.protect_tokens,
      )
      plan = focus_allocator.plan_edits(
        scores, legal, free=window.free, need=need,
        threshold=config.threshold, max_edits=config.max_edits,
      )
      edits = focus_allocator.apply_plan(window, plan, self._step)
    self._step += 1
    self._record_step(edits)
    every = config.refresh_every
    if edits and config.kv == "exact" or every and self._step % every == 0:
      self._context.forget()
    self._check()
    return len(edits)

  def _sync(self, renew: int = 1) -> None:
    before = self._context.tokens_run
    with self.telemetry.phase("fetch"):
      self._context.load_unready(self.tree)
    with self.telemetry.phase("splice"):
      self._context.sync(renew)
    self.telemetry.count("lm_tokens", self._context.tokens_run - before)

  def _cold_start(self, recent: int) -> None:
    """Retiles the whole history by distance only, within the budget."""
    config, window = self.config, self._context.window
    room = config.window * 5 // 8
    per_level = config.gists_per_level
    recent = min(recent, config.window // 2)
    while True:
      nodes = cold_start(
        self.tree.cursor, self.tree.top_level, sink=config.sink_tokens,
        recent=recent, per_level=per_level,
      )
      if len(nodes) <= max(room, recent + 2 * BRANCHING):
        break
      if per_level == 0 and recent <= BRANCHING:
        break
      per_level //= 2
      recent = max(BRANCHING, recent // 2) if per_level == 0 else recent
    if len(nodes) > config.window - BRANCHING:
      raise McjaxError(
        f"config.window {config.window} is too small for a history of "
        f"{self.tree.cursor} tokens"
      )
    window.retile(nodes)

  # --- small parts --------------------------------------------------------

  def _prompt(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the prompt, and those that close the answer."""
    tokenizer = self.lm.tokenizer
    if self.config.chat == "auto" and tokenizer.has_chat_template:
      ids, own = tokenizer.chat_turn(prompt, first=False)
      closing = np.asarray(tokenizer.end_of_turn_ids, np.int32)
    else:
      ids = tokenizer.encode(prompt)
      own, closing = np.ones(len(ids), bool), np.zeros(0, np.int32)
    words = ids[own]
    self._set_query(words, np.ones(len(words), np.float32))
    return self._with_bos(ids), closing

  def _set_query(self, ids: np.ndarray, weights: np.ndarray) -> None:
    self._query, self._query_weights = ids, weights
    self._query_start = self.tree.cursor

  def _recent_query(self) -> None:
    """Makes the newest tokens of the history the query."""
    start = max(0, self.tree.cursor - _QUERY)
    ids = self.tree.tokens(start, self.tree.cursor)
    self._set_query(ids, policies.fading_weights(len(ids)))
    self._query_start = start

  def _with_bos(self, ids: np.ndarray) -> np.ndarray:
    bos = self.lm.tokenizer.bos_id
    if self.tree.cursor or bos is None:
      return ids
    return np.concatenate([np.array([bos], np.int32), ids])

  def _answer(self, ids: list[int], stopped: bool) -> str:
    return self.lm.tokenizer.decode(ids[:-1] if stopped else ids)

  def _check_text(self, text: str, name: str) -> None:
    if self._closed:
      raise McjaxError("this MegaContext is closed; open it again")
    if not isinstance(text, str):
      raise McjaxError(f"{name} must be a string, got {type(text).__name__}")
    if not text:
      raise McjaxError(f"{name} is empty: nothing was changed")

  def _count_blocks(self, added: int) -> None:
    before = (self.tree.cursor - added) // BRANCHING
    self.telemetry.count("gist_blocks", self.tree.num_nodes(1) - before)

  def _record_step(self, edits: list[tuple[int, int, int]]) -> None:
    t, e = self.telemetry, self._context.window.entries
    expands = sum(a == EXPAND for a, *_ in edits)
    t.count("refocus_steps")
    t.count("edits", len(edits))
    t.count("expands", expands)
    t.count("collapses", len(edits) - expands)
    t.count("nodes_touched", self._policy.touched)
    t.count("bytes_read", self._policy.bytes_read)
    if edits:
      nodes = [
        (l - 1, i * BRANCHING + k) if a == EXPAND else (l, i)
        for a, l, i in edits for k in range(BRANCHING if a == EXPAND else 1)
      ]
      levels, indices = np.array(nodes, np.int64).T
      self.tree.record_access(levels, indices)
    covered = np.bincount(e.level, weights=e.width())
    t.record(
      "refocus", step=self._step, cursor=self.tree.cursor,
      edits=[[int(x) for x in edit] for edit in edits],
      utilisation=len(e) / self.config.window,
      residency=(covered / max(1.0, covered.sum())).round(6).tolist(),
      nodes_touched=self._policy.touched, lm_tokens=self._context.tokens_run,
      compiles=compile_count(),
    )

  def _check(self) -> None:
    if self.config.check_invariants:
      invariants.check_window(
        self._context.window, self.tree.cursor,
        max_level=self.tree.top_level, sink=self.config.sink_tokens,
      )
      invariants.check_positions(
        self._context.window, self.config.gist_stride,
        self.lm.config.max_positions,
      )

  def _warm_up(self) -> None:
    """Compiles every shape once, so that nothing compiles in the loop."""
    if self._warm:
      return
    self._context.warm_up()
    window = self.config.window
    legal = focus_allocator.Legal(*np.zeros((2, window), bool))
    focus_allocator.plan_edits(
      np.zeros(0, np.float32), legal, free=0, need=0,
      threshold=self.config.threshold, max_edits=self.config.max_edits,
    )
    for size in BATCH_SIZES:
      self._encoder.encode_tokens(np.zeros((size, BRANCHING), np.int32))
    self._warm = True


def _check_window(lm: BaseLM, config: Config) -> None:
  if config.window + BRANCHING > lm.config.max_positions:
    raise McjaxError(
      f"config.window {config.window} does not fit the {lm.name} base's "
      f"{lm.config.max_positions} positions (32 are kept for the next block)"
    )


def _make_policy(config: Config, lm: BaseLM, encoder: GistEncoder):
  if config.policy == "similarity":
    return policies.Similarity(config.search_nodes)
  if config.policy == "recency":
    return policies.Recency()
  if config.policy == "random":
    return policies.Random(config.seed)
  if config.policy == "oracle":
    return Oracle(config)
  return load_lensnet(lm, encoder)


def _focus_runs(window: WorkingContext) -> list[list[int]]:
  """The tiling as runs [level, first index, count, action]."""
  e = window.entries
  if not len(e):
    return []
  same = (
    (np.diff(e.level) == 0) & (np.diff(e.index) == 1) & (np.diff(e.action) == 0)
  )
  starts = np.concatenate([[0], np.flatnonzero(~same) + 1])
  counts = np.diff(np.concatenate([starts, [len(e)]]))
  return [
    [int(e.level[s]), int(e.index[s]), int(n), int(e.action[s])]
    for s, n in zip(starts, counts)
  ]


def _blocks(cursor: int, count: int) -> list[tuple[int, int]]:
  """Cuts [0, count) where the history, now at cursor, ends a block."""
  first = min(count, BRANCHING - cursor % BRANCHING)
  edges = [0, *range(first, count, BRANCHING), count]
  return list(zip(edges[:-1], edges[1:]))


def _unsaid(closing: np.ndarray, said: list[int]) -> np.ndarray:
  """The closing ids the model has not generated itself."""
  if said and len(closing) and said[-1] == closing[0]:
    return closing[1:]
  return closing
