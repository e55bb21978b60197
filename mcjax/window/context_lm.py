"""ContextLM: the frozen LM looking at the working context.

Binds the window's bookkeeping (host), its slot KV cache (device) and the
tree. Entries get their input embeddings when they enter the window and their
keys and values lazily, in position order, when the LM next has to speak; so
edits planned and undone in between cost nothing.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model
from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.gist.encoder import GistEncoder
from mcjax.pretrained import cards
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, McjaxError
from mcjax.window import kv_slots
from mcjax.window.contrast import Contrast
from mcjax.window.decoding import Decoder, Draw, Job, Said, Seen
from mcjax.window.sampling import Sampling
from mcjax.window.working_context import (
  Attention,
  Entries,
  WorkingContext,
  out_of_sight,
  positions_of,
)

_LOAD = 256  # padded batch of input embeddings
_WARM: set[tuple] = set()  # shapes compiled in this process


class Nodes(Protocol):
  """Where the window's inputs come from: a tree, or a plain text."""

  def tokens(self, start: int, stop: int) -> np.ndarray:
    """Token ids [start, stop), int32 [n]."""

  def gists(self, level: int, start: int, stop: int) -> np.ndarray:
    """Gists [start, stop) of a level, float32 [n, D]."""


class ContextLM:
  """The LM over a window of mixed tokens and gists.

  Attributes:
    lm: the base, as it reads the gists (`GistEncoder.reader`).
    window: the bookkeeping; its entries say what the LM sees.
    tokens_run: token-forwards of the base so far, padding excluded.
    tokens_decoded: tokens generated so far.
    show_gists: whether the LM attends to gists: to all of them, or to the
      newest `window.gists_seen`.
  """

  def __init__(self, lm: BaseLM, config: Config, show_gists: bool,
               gists_seen: int | None = None):
    if config.window + BRANCHING > lm.config.max_positions:
      raise McjaxError(
        f"config.window {config.window} does not fit the {lm.name} base's "
        f"{lm.config.max_positions} positions (32 are kept for the next block)"
      )
    self.lm = lm
    self.show_gists = show_gists
    self._config = config = cards.settled(config, lm.name)
    self._slots = config.window + BRANCHING  # the next block's beside
    self.window = WorkingContext(self._slots)
    self.window.gists_seen = gists_seen if show_gists else None
    dtype = lm.params["embed"].dtype
    self.state = kv_slots.init(lm.config, self._slots, dtype)
    self._decoder: Decoder | None = None
    self._row = 0
    self._fresh = True  # keys and values were computed since the last block
    # A collapse of hidden gists leaves one entry to run: the newest.
    self._sizes = (1, *kv_slots.splice_sizes(config.max_edits))
    self._contrast: Contrast | None = None
    if config.contrast:
      self._contrast = Contrast(lm, self._slots, self._sizes)
    self._hidden: jax.Array | None = None
    self._rows = 0
    self._logits: jax.Array | None = None
    self.tokens_run = 0
    self.tokens_decoded = 0
    ids = sorted(lm.tokenizer.stop_ids)[: kv_slots.STOP_IDS]
    self._stop_ids = np.full(kv_slots.STOP_IDS, -1, np.int32)
    self._stop_ids[: len(ids)] = ids

  @classmethod
  def reading(cls, lm: BaseLM, config: Config, encoder: GistEncoder
              ) -> ContextLM:
    """The LM over gists of `encoder`, shown or not as `config` says.

    "auto" does what the GistNet's card measured to be best at this window.
    """
    seen = {"visible": config.gists_seen or None, "masked": 0}.get(
      config.gist_attention, encoder.gists_seen(config.window))
    return cls(encoder.reader(lm), config, seen != 0, seen)

  # --- inputs -------------------------------------------------------------

  def load(self, entries: Entries, tree: Nodes) -> None:
    """Fetches the inputs of `entries` from the tree into their slots."""
    if not len(entries):
      return
    cuts = np.flatnonzero(
      (np.diff(entries.level) != 0) | (np.diff(entries.index) != 1)
    )
    for run in np.split(np.arange(len(entries)), cuts + 1):
      level, first = int(entries.level[run[0]]), int(entries.index[run[0]])
      slots = entries.slot[run]
      if level == 0:
        self._load_tokens(slots, tree.tokens(first, first + len(run)))
      else:
        self._load_gists(slots, tree.gists(level, first, first + len(run)))

  def load_unready(self, tree: Nodes) -> None:
    """Fetches the inputs of every entry that has no keys and values yet."""
    self.load(self._subset(np.flatnonzero(~self.window.entries.ready)), tree)

  def node_inputs(self, tree: MegaContextTree, level: int, first: int,
                  count: int) -> np.ndarray:
    """Input embeddings [count, D] float32 of nodes from `first` on."""
    if level:
      return tree.gists(level, first, first + count)
    return self.token_embeddings(tree.tokens(first, first + count))

  @property
  def gist_stride(self) -> int:
    """Positions a gist takes at most; none where the LM sees no gists.

    Gaps in front of text would make it look farther away than it is.
    """
    return self._config.gist_stride if self.show_gists else 0

  @property
  def gists_wanted(self) -> int:
    """Gists that the LM attends to, at most."""
    if not self.show_gists:
      return 0
    seen = self.window.gists_seen
    return self._slots if seen is None else seen

  def positions_of(self, levels: np.ndarray) -> np.ndarray:
    """Positions [E] a window of entries with `levels` [E] would have."""
    return positions_of(
      levels, self.gist_stride, self.lm.config.max_positions,
      out_of_sight(levels, self.window.gists_seen),
    )

  def token_embeddings(self, token_ids: np.ndarray) -> np.ndarray:
    """Input embeddings [n, D] float32 of token ids [n]."""
    return np.asarray(kv_slots.embed(self.lm.params, token_ids), np.float32)

  def _subset(self, rows: np.ndarray) -> Entries:
    return Entries(*(a[rows] for a in self.window.entries.arrays()))

  def _load_tokens(self, slots: np.ndarray, ids: np.ndarray) -> None:
    for a in range(0, len(slots), _LOAD):
      inputs = kv_slots.load_tokens(
        self.lm.params, self.state.inputs,
        self._padded(slots[a : a + _LOAD], _LOAD),
        kv_slots.pad(ids[a : a + _LOAD].astype(np.int32), _LOAD, 0),
      )
      self.state = self.state._replace(inputs=inputs)

  def _load_gists(self, slots: np.ndarray, gists: np.ndarray) -> None:
    for a in range(0, len(slots), _LOAD):
      rows = gists[a : a + _LOAD].astype(np.float32)
      fill = np.zeros((_LOAD - len(rows), rows.shape[1]), np.float32)
      inputs = kv_slots.load_gists(
        self.state.inputs, self._padded(slots[a : a + _LOAD], _LOAD),
        np.concatenate([rows, fill]),
      )
      self.state = self.state._replace(inputs=inputs)

  def _padded(self, slots: np.ndarray, size: int) -> np.ndarray:
    return kv_slots.pad(slots.astype(np.int32), size, self._slots)

  # --- keys and values ----------------------------------------------------

  def slot_arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """Positions [S] and visibility [S], unready slots hidden."""
    positions, visible = self.window.slot_arrays(
      self.gist_stride, self.lm.config.max_positions, self.show_gists
    )
    e = self.window.entries
    visible[e.slot[~e.ready]] = False
    return positions, visible

  @property
  def is_synced(self) -> bool:
    """Whether every entry that the LM attends to has its keys and values.

    So it is after a collapse into a gist that the LM does not see: the newest
    token's prediction is then as good as its keys and values, which date from
    before the collapse too.
    """
    e = self.window.entries
    seen = ~self.window.hidden()
    if not self.show_gists:
      seen &= e.level == 0
    return bool(e.ready[seen].all())

  def forget(self) -> None:
    """Marks every entry unready: the next `sync` is an exact rebuild."""
    self.window.mark_unready()

  def attend(self, attention: Attention | None) -> bool:
    """Sets what the LM attends to of raw text; None is all of it.

    Earlier text that is or was all that is attended to is marked unready: it
    is run again beside what else is seen now.

    Returns:
      Whether anything changed.
    """
    window = self.window
    if attention == window.attention:
      return False
    for narrow in (window.attention, attention):
      if narrow is not None:
        window.entries.ready[narrow.earlier(window.entries)[0]] = False
    window.attention = attention
    if self._contrast is not None:
      self._contrast.clear()
    return True

  def sync(self, renew: int = 1) -> None:
    """Computes what is missing, and the newest `renew` entries anew.

    Entries without keys and values are run in position order, in padded
    chunks; the newest ones run again because what they attend to may have
    changed; hidden ones are left alone. Afterwards `decode` and `newest_nll`
    may be called.
    """
    e = self.window.entries
    if not self.show_gists:
      e.ready[e.level > 0] = True
    todo = ~e.ready
    todo[len(e) - min(renew, len(e)) :] = True
    todo &= ~self.window.hidden()
    rows = np.flatnonzero(todo)
    if self.window.attention is not None:  # as read, the prompt's head first
      order = self.window.attention.order(e)
      rows = order[todo[order]]
    e.ready[rows] = False
    largest = self._sizes[-1]
    # The remainder goes first: the last chunk is full and holds the newest.
    head = len(rows) % largest
    chunks = [c for c in np.split(rows, range(head, len(rows), largest))
              if len(c)]
    self._logits, self._fresh = None, True
    for chunk in chunks:
      self._hidden, self._rows = self._run(chunk, kv_slots.splice)
    if contrast := self._contrasting:
      self.tokens_run += contrast.sync(self.window, self.state.inputs)

  @property
  def _contrasting(self) -> Contrast | None:
    """The second cache, while decoding is held against it."""
    return None if self.window.attention is None else self._contrast

  def _run(self, rows: np.ndarray, function) -> tuple[jax.Array, int]:
    e = self.window.entries
    e.ready[rows] = True
    positions, visible = self.slot_arrays()
    size = next(s for s in self._sizes if s >= len(rows))
    out = function(
      self.lm.params, self.lm.config, self.state,
      self._padded(e.slot[rows], size), positions, visible,
      kv_slots.pad(e.level[rows] > 0, size, False),
    )
    self.tokens_run += len(rows)
    if function is kv_slots.splice:
      self.state, out = out
    return out, len(rows)

  def newest_nll(self, token_ids: np.ndarray) -> np.ndarray:
    """NLL [n] in nats of the newest n entries, which hold `token_ids`.

    Valid after `sync(renew=n + 1)`. Without an entry before them the first
    one has no prediction and is NaN.
    """
    return self._nll(self._hidden, self._rows, token_ids)

  def probe_nll(self, token_ids: np.ndarray) -> np.ndarray:
    """As `newest_nll`, computed against the window as it is, storing nothing.

    At most `n + 1` entries are run; n must be below the smallest expand size,
    and none of them hidden.
    """
    e = self.window.entries
    first = max(0, len(e) - len(token_ids) - 1)
    hidden, rows = self._run(np.arange(first, len(e)), kv_slots.peek)
    return self._nll(hidden, rows, token_ids)

  def _nll(self, hidden, rows: int, token_ids: np.ndarray) -> np.ndarray:
    count = len(token_ids)
    first = rows - 1 - count  # row of the entry before the first token
    targets = np.zeros(hidden.shape[0], np.int32)
    missing = max(0, -first)
    at = first + missing
    targets[at : at + count - missing] = token_ids[missing:]
    values = np.asarray(kv_slots.nll(self.lm.params, hidden, targets))
    out = np.full(count, np.nan, np.float32)
    out[missing:] = values[at : at + count - missing]
    return out

  @property
  def decoder(self) -> Decoder:
    """Decodes this window; one of its own unless it has joined another's."""
    if self._decoder is None:
      self._decoder = self.decoder_of(1, model.unstacked(self.lm.params))
    return self._decoder

  def decoder_of(self, rows: int, params) -> Decoder:
    """A decoder of so many windows like this one; `model.unstacked` params."""
    return Decoder(params, self.lm.config, rows, self._slots,
                   self.state.inputs.dtype, self._stop_ids)

  def join(self, decoder: Decoder, row: int) -> None:
    """Decodes as one row of a decoder that others use too."""
    self._decoder, self._row = decoder, row
    decoder.release(row)

  def ask(self, limit: int, draw: Draw) -> Job:
    """A job for the decoder, of at most `limit` <= 32 tokens.

    Valid after `sync`, and again after each `take` that follows no edit; one of
    `take` and `drop` must follow.
    """
    slots = self.window.take_slots(limit)
    positions, visible = self.slot_arrays()
    first = self.window.next_position(
      self.gist_stride, self.lm.config.max_positions)
    seen = Seen(self.state, positions, visible, first, self._ready_logits(),
                self._fresh)
    contrast = self._contrasting
    prior = contrast.prior(self.window) if contrast else None
    return Job(self._row, limit, slots, draw, seen, prior,
               self._config.contrast or 0.0)

  def drop(self, job: Job) -> None:
    """Gives up a job that was not decoded."""
    self.window.give_slots(job.slots)

  def take(self, job: Job, said: Said) -> None:
    """Lets what was decoded enter the window."""
    count, start = len(said.tokens), self.window.cursor
    self.state, self._logits = said.states[0], said.logits[0]
    self._fresh = False
    self.window.give_slots(job.slots[count:])
    self.window.append_tokens(job.slots[:count], ready=True)
    self.tokens_decoded += count
    self.tokens_run += count
    if job.prior is not None and self._contrast is not None:
      self._contrast.take(
        (said.states[1], said.logits[1]), job.slots[:count],
        np.arange(start, start + count))
      self.tokens_run += count

  def decode(self, limit: int, temperature: float, key: jax.Array
             ) -> tuple[np.ndarray, bool]:
    """Generates at most `limit` <= 32 tokens; they enter the window.

    Valid as `ask` is.

    Returns:
      token ids [n] int32 and whether the last one is a stop token.
    """
    job = self.ask(limit, Draw(Sampling(temperature=temperature), key))
    said = self.decoder.run([job])[0]
    self.take(job, said)
    return said.tokens, said.stopped

  def wait(self) -> None:
    """Blocks until the device is done, so that phases are timed truly."""
    if self._hidden is not None:
      jax.block_until_ready(self._hidden)

  def logits(self) -> np.ndarray:
    """Logits [V] float32 for the next token; valid after `sync`."""
    return np.asarray(self._ready_logits())

  def _ready_logits(self) -> jax.Array:
    if self._logits is None:
      self._logits = kv_slots.next_logits(
        self.lm.params, self._hidden, np.int32(self._rows - 1)
      )
    return self._logits

  # --- whole state --------------------------------------------------------

  def snapshot(self, cache: bool = True) -> tuple:
    """A copy of everything `restore` needs; device buffers are duplicated.

    Args:
      cache: False leaves the cache out, where the LM will not run.
    """
    state = jax.tree.map(jnp.copy, self.state) if cache else None
    return self.window.copy(), state, self._hidden, self._rows, self._logits

  def restore(self, snapshot: tuple) -> None:
    """Puts the window and its cache back; consumes the snapshot."""
    window, state, self._hidden, self._rows, self._logits = snapshot
    if state is not None:
      self.state = state
    self.window.become(window)
    self._fresh = True
    if self._contrast is not None:
      self._contrast.reset()  # work that was cut off may have lost its cache

  def warm_up(self) -> None:
    """Compiles every shape the loop can meet, on an empty cache."""
    window = self._slots
    # Compiled programs live as long as the process: once a shape is enough.
    shapes = (
      self.lm.config, window, self._sizes, bool(self._config.delta_nll_every),
      str(self.state.inputs.dtype), self._contrast is not None,
      self.decoder.rows,
    )
    if shapes in _WARM:
      return
    snapshot = self.snapshot()
    positions = np.zeros(window, np.int32)
    visible = np.zeros(window, bool)
    for size in self._sizes:
      slots = np.full(size, window, np.int32)
      args = (self.lm.params, self.lm.config, self.state, slots, positions,
              visible, np.zeros(size, bool))
      self.state, hidden = kv_slots.splice(*args)
      kv_slots.nll(self.lm.params, hidden, np.zeros(size, np.int32))
      kv_slots.next_logits(self.lm.params, hidden, np.int32(0))
    if self._config.delta_nll_every:
      size = next(s for s in self._sizes if s > BRANCHING)
      kv_slots.peek(self.lm.params, self.lm.config, self.state,
                    np.full(size, window, np.int32), positions, visible,
                    np.zeros(size, bool))
    self._load_tokens(np.full(1, window), np.zeros(1, np.int32))
    self._load_gists(
      np.full(1, window), np.zeros((1, self.lm.config.d_model), np.float32)
    )
    self.decoder.warm_up(self.state, self._contrast is not None)
    self.restore(snapshot)
    _WARM.add(shapes)
