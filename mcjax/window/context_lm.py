"""ContextLM: the frozen LM looking at the working context.

Binds the window's bookkeeping (host), its slot KV cache (device) and the
tree. Entries get their input embeddings when they enter the window and their
keys and values lazily, in position order, when the LM next has to speak; so
edits planned and undone in between cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.gist.encoder import GistEncoder
from mcjax.pretrained import cards
from mcjax.types import BRANCHING, McjaxError
from mcjax.window import kv_slots
from mcjax.window.contrast import Contrast
from mcjax.window.decoding import Decoder, Draw, Job, Said, Seen
from mcjax.window.kv_slots import KVSlots
from mcjax.window.sampling import Sampling
from mcjax.window.slot_inputs import SlotInputs
from mcjax.window.spread import ALONE, Spread
from mcjax.window.undo import Undo
from mcjax.window.working_context import (
  Attention,
  out_of_sight,
  positions_of,
)

_WARM: set[tuple] = set()  # shapes compiled in this process


class ContextLM(SlotInputs):
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
    super().__init__(lm, config.window + BRANCHING)  # the next block's beside
    self.show_gists = show_gists
    self._config = config = cards.settled(config, lm.name)
    self.window.gists_seen = gists_seen if show_gists else None
    self._decoder: Decoder | None = None
    self._row = self._lost = 0
    # A collapse of hidden gists leaves one entry to run: the newest.
    self._sizes = (1, *kv_slots.splice_sizes(config.max_edits))
    self._contrast: Contrast | None = None
    if config.contrast:
      self._contrast = Contrast(lm, self._slots)
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
    self._notice_loss()
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

    Evidence that is or was all that is attended to is marked unready: it is
    run again beside what else is seen now.

    Returns:
      Whether anything changed.
    """
    window = self.window
    if attention == window.attention:
      return False
    for narrow in (window.attention, attention):
      if narrow is not None and narrow.evidence:
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
    self._notice_loss()
    self._draw_near()
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
    self._logits = None
    for chunk in chunks:
      self._hidden, self._rows = self._run(chunk)
    if contrast := self._contrasting:
      self.tokens_run += contrast.sync(self, self.decoder, self._row)
    if self._lost != self.decoder.lost:  # meanwhile: once more, from nothing
      self.sync(renew)

  @property
  def _contrasting(self) -> Contrast | None:
    """The second cache, while decoding is held against it."""
    attention = self.window.attention
    reads = attention is not None and attention.evidence
    return self._contrast if reads else None

  def _run(self, rows: np.ndarray, store: bool = True
           ) -> tuple[jax.Array, int]:
    e = self.window.entries
    e.ready[rows] = True
    if store:
      self._undo.written[e.slot[rows]] = True
    slots = e.slot[rows]
    hidden = self.decoder.splice(
      0, self._row, slots, self.inputs_of(slots), self.slot_arrays(), store)
    self.tokens_run += len(rows)
    return hidden, len(rows)

  def _notice_loss(self) -> None:
    """Another's work was cut off, and all that the decoder held is lost."""
    if self._decoder is not None and self._lost != self._decoder.lost:
      self._lost = self._decoder.lost
      self.forget()
      if self._contrast is not None:
        self._contrast.clear()

  def _draw_near(self, more: np.ndarray | None = None) -> np.ndarray | None:
    """Moves what is seen into near slots, where there are enough of them.

    Args:
      more: slots that tokens will go to; by default so many as a block has.

    Returns:
      These slots as they are now.
    """
    e, near = self.window.entries, self.decoder.near
    wanted = np.zeros(self._slots, bool)
    shown = ~self.window.hidden() & (self.show_gists | (e.level == 0))
    wanted[e.slot[shown]] = True
    count = BRANCHING
    if more is not None:
      wanted[more], count = True, 0
    far = np.flatnonzero(wanted[near:]) + near
    if not len(far) or np.count_nonzero(wanted) + count > near:
      return more
    order = np.arange(self._slots)
    room = np.flatnonzero(~wanted[:near])[: len(far)]
    order[far], order[room] = room, far  # they change places
    self._permute(order)
    return None if more is None else order[more].astype(np.int32)

  def _permute(self, order: np.ndarray) -> None:
    """Lets slots change places; `order` [S] is its own inverse."""
    self.decoder.permute(self._row, order)
    self._permute_inputs(order)
    self.window.permute(order)
    self._undo.permute(order)

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
    hidden, rows = self._run(np.arange(first, len(e)), store=False)
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
      self._decoder = self.decoder_of(1)
    return self._decoder

  def decoder_of(self, rows: int, splices: int = 1, params=None,
                 spread: Spread = ALONE) -> Decoder:
    """A decoder of so many windows like this one.

    Args:
      rows: the windows.
      splices: that run together on a device, at most.
      params: laid out by `spread`; by default those of the base.
      spread: of the rows.
    """
    return Decoder(params or self.lm.params, self.lm.config, rows, self._slots,
                   self.lm.params["embed"].dtype, self._stop_ids, self._sizes,
                   splices, spread)

  def join(self, decoder: Decoder, row: int) -> None:
    """Lives as one row of a decoder that others use too."""
    self._decoder, self._row, self._lost = decoder, row, decoder.lost
    self.forget()
    if self._contrast is not None:
      self._contrast.clear()

  def ask(self, limit: int, draw: Draw) -> Job:
    """A job for the decoder, of at most `limit` <= 32 tokens.

    Valid after `sync`, and again after each `take` that follows no edit; one of
    `take` and `drop` must follow.
    """
    slots = self._draw_near(self.window.take_slots(limit))
    assert slots is not None
    self._undo.written[slots] = True
    positions, visible = self.slot_arrays()
    first = self.window.next_position(
      self.gist_stride, self.lm.config.max_positions)
    seen = Seen(positions, visible, first, self._ready_logits(), slots)
    contrast = self._contrasting
    prior = contrast.prior(self.window, limit) if contrast else None
    return Job(self._row, limit, draw, seen, prior,
               self._config.contrast or 0.0)

  def drop(self, job: Job) -> None:
    """Gives up a job that was not decoded."""
    self.window.give_slots(job.window.slots)

  def take(self, job: Job, said: Said) -> None:
    """Lets what was decoded enter the window."""
    count, start = len(said.tokens), self.window.cursor
    slots = job.window.slots
    self._logits, self._hidden = said.logits[0], None
    self._load_tokens(slots[:count], said.tokens)
    self.window.give_slots(slots[count:])
    self.window.append_tokens(slots[:count], ready=True)
    self.tokens_decoded += count
    self.tokens_run += count
    if job.prior is not None and self._contrast is not None:
      self._contrast.take(said.logits[1], job.prior.slots[:count],
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

  @property
  def state(self) -> KVSlots:
    """What the slots hold, by itself: a copy, its keys un-rotated."""
    held, positions = self.decoder.read(self._row)
    return kv_slots.at_rest(self.lm.config, held, positions)

  @state.setter
  def state(self, state: KVSlots) -> None:
    positions, _ = self.slot_arrays()
    self.decoder.replace(self._row, kv_slots.at_work(
      self.lm.config, state, positions), positions)

  def snapshot(self, exact: bool = True) -> tuple:
    """What `restore` needs; the newest one only can be restored.

    Args:
      exact: keeps a copy of the cache on the host. Without one, what is
        overwritten meanwhile is computed again after `restore`.
    """
    kept = None
    if exact:
      held, positions = self.decoder.read(self._row)
      kept = (jax.device_get(held), positions, self.ids.copy(),
              self.gists.copy(), self.is_gist.copy())
    self._notice_loss()  # a copy would take what is lost for ready
    self._undo = Undo(self._slots)
    return (self.window.copy(), kept, self._lost, self._hidden, self._rows,
            self._logits)

  def restore(self, snapshot: tuple) -> None:
    """Puts the window and its cache back; consumes the snapshot."""
    window, kept, lost, self._hidden, self._rows, self._logits = snapshot
    if kept is None:
      self._undo.amend(window)
      if self._lost != lost:
        window.mark_unready()
    else:
      held, positions, self.ids, self.gists, self.is_gist = kept
      self.decoder.replace(self._row, held, positions)
    self.window.become(window)
    if self._contrast is not None:
      self._contrast.clear()

  @property
  def is_alone(self) -> bool:
    """Whether no other windows are decoded with this one."""
    return self.decoder.rows == 1 and self.decoder.spread == ALONE

  def twin(self) -> ContextLM:
    """An empty window of the same shapes, with a cache of its own."""
    return ContextLM(
      self.lm, self._config, self.show_gists, self.window.gists_seen)

  def warm_up(self) -> None:
    """Compiles every shape the loop can meet, on an empty cache."""
    for _ in self.programs():
      pass

  def programs(self, reads_little: bool = False) -> Iterator[None]:
    """Compiles them one at a time.

    Args:
      reads_little: an answer that is held against what the LM says without
        the text comes first.
    """
    # Compiled programs live as long as the process: once a shape is enough.
    dtype, contrast = self.lm.params["embed"].dtype, self._contrast is not None
    shapes = (self.lm.config, self._slots, self._sizes, str(dtype), contrast,
              self.decoder.rows, self.decoder.splicer.width,
              self.decoder.spread)
    if shapes in _WARM:
      return
    yield from self.decoder.programs(
      contrast, first=1 + (contrast and reads_little))
    for size in self._sizes:
      hidden = self.decoder.spread.at_home(
        jnp.zeros((size, self.lm.config.d_model), dtype))
      kv_slots.nll(self.lm.params, hidden, np.zeros(size, np.int32))
      kv_slots.next_logits(self.lm.params, hidden, np.int32(0))
      yield
    _WARM.add(shapes)
