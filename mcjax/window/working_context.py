"""WorkingContext: which spans the frozen LM sees, how finely, in which slot.

Host-side bookkeeping in NumPy. Entries tile the timeline [0, cursor) in order;
each owns one slot of the device cache. Edits swap 32 siblings and their parent
atomically. Nothing here touches the LM, the tree's contents or the device.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from mcjax.tree.journal import overlaps
from mcjax.types import BRANCHING, Entry, McjaxError, span_width

EXPAND, COLLAPSE = 1, -1
FIRST = (0, 1)  # span of the history's first token, an attention sink
_NEVER = -(1 << 30)


class Attention(NamedTuple):
  """Raw text that the LM attends to while it answers a question.

  Attributes:
    spans: token spans (start, stop) of earlier text; the rest of it is hidden.
    start: first token of the prompt; from there on nothing is hidden.
    head: tokens of the prompt that stand before what is read: what the chat
      template writes in front of the user's words.
    framed: spans of earlier text that are turns of the conversation, what the
      template writes around them included: they stay before the head.
    evidence: the spans are what is read for the answer: they are run anew
      beside each other alone. Else they are the conversation so far.
  """

  spans: tuple[tuple[int, int], ...]
  start: int
  head: int = 0
  framed: tuple[tuple[int, int], ...] = ()
  evidence: bool = True

  def earlier(self, entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """Raw entries before the prompt, [E] bool: those attended to, those not."""
    token = entries.start()
    earlier = (entries.level == 0) & (token < self.start)
    inside = np.zeros(len(entries), bool)
    for start, stop in (*self.spans, *self.framed):
      inside |= (token >= start) & (token < stop)
    return earlier & inside, earlier & ~inside

  def order(self, entries: Entries) -> np.ndarray:
    """Rows [E] in the order in which the LM reads them.

    That of time, but the prompt's head comes right behind the first token, so
    that what is read stands inside the user's turn, and behind other turns.
    """
    token = entries.start()
    rank = np.where(token == FIRST[0], 0, 2)
    for start, stop in self.framed if self.head else ():
      rank[(token >= start) & (token < stop)] = 0
    rank[(token >= self.start) & (token < self.start + self.head)] = 1
    rank[token >= self.start + self.head] = 3
    return np.argsort(rank, kind="stable")


@dataclasses.dataclass
class Entries:
  """Parallel arrays over the E entries, in timeline order.

  Attributes:
    level: [E] int32.
    index: [E] int64 node index at that level (the token's own at L0).
    slot: [E] int32 slot in the device cache.
    ready: [E] bool, the slot's keys and values are computed.
    action: [E] int8 edit that made the entry (EXPAND, COLLAPSE or 0).
    born: [E] int64 refocus step of that edit.
  """

  level: np.ndarray
  index: np.ndarray
  slot: np.ndarray
  ready: np.ndarray
  action: np.ndarray
  born: np.ndarray

  @classmethod
  def make(cls, level, index, slot, ready=False, action=0, born=_NEVER):
    index = np.asarray(index, np.int64)
    full = np.full
    return cls(
      full(index.shape, level, np.int32) if np.isscalar(level)
      else np.asarray(level, np.int32),
      index,
      np.asarray(slot, np.int32),
      full(index.shape, ready, bool),
      full(index.shape, action, np.int8),
      full(index.shape, born, np.int64),
    )

  def __len__(self) -> int:
    return len(self.index)

  def width(self) -> np.ndarray:
    """Tokens each entry covers, [E] int64."""
    return np.int64(BRANCHING) ** self.level.astype(np.int64)

  def start(self) -> np.ndarray:
    """First token of each entry, [E] int64."""
    return self.index * self.width()

  def replaced(self, start: int, stop: int, new: Entries) -> Entries:
    """A copy in which entries [start, stop) are `new`."""
    return Entries(*(
      np.concatenate([old[:start], fresh, old[stop:]])
      for old, fresh in zip(self.arrays(), new.arrays())
    ))

  def arrays(self) -> tuple[np.ndarray, ...]:
    return (self.level, self.index, self.slot, self.ready, self.action,
            self.born)


def cover(start: int, stop: int, max_level: int) -> list[tuple[int, int]]:
  """Coarsest aligned (level, index) nodes that tile [start, stop).

  At most 31 nodes per level and side; `max_level` bounds the level.
  """
  nodes = []
  while start < stop:
    level = 0
    while (
      level < max_level
      and start % span_width(level + 1) == 0
      and start + span_width(level + 1) <= stop
    ):
      level += 1
    nodes.append((level, start // span_width(level)))
    start += span_width(level)
  return nodes


def cold_start(
  cursor: int, top_level: int, *, sink: int, recent: int, per_level: int
) -> list[tuple[int, int]]:
  """Tiling of [0, cursor) before anything is known about what matters.

  The first `sink` tokens and at least the newest `recent` tokens are at L0;
  before those come about `per_level` nodes of L1, then of L2, and so on,
  aligned, the coarsest level taking the rest.

  Returns:
    (level, index) of every entry in timeline order.
  """
  sink = min(sink, cursor)
  pieces: list[list[tuple[int, int]]] = []
  stop = cursor
  for level in range(top_level + 1):
    width, parent = span_width(level), span_width(level + 1)
    wanted = recent if level == 0 else per_level * width
    start = max(sink, (stop - wanted) // parent * parent)
    if level == top_level:
      start = sink
    if start > sink or level == top_level:
      pieces.append(cover(start, stop, level))
      stop = start
    else:
      pieces.append(cover(sink, stop, level))
      stop = sink
    if stop <= sink:
      break
  nodes = [(0, i) for i in range(sink)]
  for piece in reversed(pieces):
    nodes.extend(piece)
  return nodes


def effective_stride(
  level: np.ndarray, gist_stride: int, max_positions: int
) -> int:
  """The largest stride <= gist_stride that keeps a window in range.

  Args:
    level: [E] int, levels of the window's entries.
    gist_stride: positions a gist would take; 0 where the LM sees none.
    max_positions: the base's; 32 are kept for the next block.
  """
  gists = int(np.count_nonzero(level))
  if not gists:
    return gist_stride
  room = max_positions - BRANCHING - (len(level) - gists)
  return min(gist_stride, max(1, room // gists))


def out_of_sight(level: np.ndarray, gists_seen: int | None) -> np.ndarray:
  """[E] bool: gists that are not among the newest `gists_seen` (None: all)."""
  out = np.zeros(len(level), bool)
  if gists_seen is not None:
    gists = np.flatnonzero(level)
    out[gists[: max(0, len(gists) - gists_seen)]] = True
  return out


def positions_of(
  level: np.ndarray, gist_stride: int, max_positions: int,
  hidden: np.ndarray | None = None,
) -> np.ndarray:
  """Positions [E] int32 of entries with levels [E], in timeline order.

  A token advances the position by 1, a gist by the effective stride; an entry
  sits at the centre of its stride. `hidden` [E] entries take no position.
  """
  stride = effective_stride(level, gist_stride, max_positions)
  steps = np.where(level > 0, stride, 1)
  if hidden is not None:
    steps[hidden] = 0
  ends = np.cumsum(steps)
  return (ends - steps + steps // 2).astype(np.int32)


class WorkingContext:
  """Fixed number of slots holding a contiguous, aligned, mixed-level tiling.

  Attributes:
    window: slots, 32 of them for the block that is being read or written.
    entries: the tiling.
    attention: what the LM attends to of raw text; None for all of it.
    forgotten: [n, 2] spans of tokens that the LM may not see, see `Journal`.
    gists_seen: the newest gists, so many, that the LM may see, and none while
      an answer is read from sentences; None for all, always.
  """

  def __init__(self, window: int):
    self.window = window
    self.gists_seen: int | None = None
    self.forgotten = np.zeros((0, 2), np.int64)
    self.attention: Attention | None = None
    self.entries = Entries.make(0, [], [])
    self._free = list(range(window - 1, -1, -1))

  @property
  def cost(self) -> int:
    """Slots in use."""
    return len(self.entries)

  @property
  def free(self) -> int:
    return len(self._free)

  @property
  def cursor(self) -> int:
    """Token just behind the last entry."""
    if not len(self.entries):
      return 0
    e = self.entries
    return int((e.index[-1] + 1) * span_width(int(e.level[-1])))

  def focus(self) -> list[Entry]:
    """The tiling of [0, cursor), runs of L0 tokens kept apart."""
    e = self.entries
    starts, widths = e.start(), e.width()
    return [
      Entry(int(level), int(a), int(a + w))
      for level, a, w in zip(e.level, starts, widths)
    ]

  def take_slots(self, count: int) -> np.ndarray:
    """Reserves `count` free slots.

    Raises:
      McjaxError: fewer than `count` are free.
    """
    if count > self.free:
      raise McjaxError(
        f"window of {self.window} is full: {count} slots wanted, "
        f"{self.free} free"
      )
    return np.array([self._free.pop() for _ in range(count)], np.int32)

  def give_slots(self, slots: np.ndarray) -> None:
    """Returns slots to the free list, of which the lowest are taken first."""
    if len(slots):
      self._free.extend(int(s) for s in slots)
      self._free.sort(reverse=True)

  def permute(self, order: np.ndarray) -> None:
    """Slot i becomes slot order[i], for entries and free ones."""
    self.entries.slot = order[self.entries.slot].astype(np.int32)
    self._free = sorted((int(order[s]) for s in self._free), reverse=True)

  def append_tokens(self, slots: np.ndarray, ready: bool = False) -> None:
    """Adds the next len(slots) tokens of the timeline at L0."""
    first = self.cursor
    new = Entries.make(
      0, np.arange(first, first + len(slots)), slots, ready=ready
    )
    end = len(self.entries)
    self.entries = self.entries.replaced(end, end, new)

  def expand(self, at: int, step: int) -> Entries:
    """Replaces entry `at` by its 32 children; returns the children."""
    e = self.entries
    level, index = int(e.level[at]), int(e.index[at])
    if level == 0:
      raise McjaxError("an L0 entry cannot be expanded")
    slots = np.concatenate([e.slot[at : at + 1],
                            self.take_slots(BRANCHING - 1)])
    children = Entries.make(
      level - 1, index * BRANCHING + np.arange(BRANCHING), slots,
      action=EXPAND, born=step,
    )
    self.entries = e.replaced(at, at + 1, children)
    return children

  def collapse(self, at: int, step: int) -> Entries:
    """Replaces the 32 siblings from entry `at` on by their parent.

    Raises:
      McjaxError: entry `at` is not the first of 32 siblings that are all
        present at its level.
    """
    e = self.entries
    if not self.sibling_groups()[at]:
      raise McjaxError(
        f"entry {at} does not start 32 siblings of one level"
      )
    freed = e.slot[at : at + BRANCHING]
    parent = Entries.make(
      e.level[at : at + 1] + 1, e.index[at : at + 1] // BRANCHING, freed[:1],
      action=COLLAPSE, born=step,
    )
    self.give_slots(freed[1:])
    self.entries = e.replaced(at, at + BRANCHING, parent)
    return parent

  def sibling_groups(self) -> np.ndarray:
    """[E] bool: the entry starts 32 siblings all present at its level."""
    e = self.entries
    count = len(e)
    groups = np.zeros(count, bool)
    if count < BRANCHING:
      return groups
    last = np.arange(count - BRANCHING + 1)
    far = last + BRANCHING - 1
    groups[: len(last)] = (
      (e.index[last] % BRANCHING == 0)
      & (e.level[far] == e.level[last])
      & (e.index[far] == e.index[last] + BRANCHING - 1)
    )
    return groups

  def retile(self, nodes: list[tuple[int, int]]) -> None:
    """Replaces the whole tiling, keeping slots of entries that stay."""
    e = self.entries
    old = {
      (int(l), int(i)): k for k, (l, i) in enumerate(zip(e.level, e.index))
    }
    kept = [old.get(node, -1) for node in nodes]
    gone = np.ones(len(e), bool)
    gone[[k for k in kept if k >= 0]] = False
    self.give_slots(e.slot[gone])
    fresh = self.take_slots(sum(k < 0 for k in kept))
    level = np.array([n[0] for n in nodes], np.int32)
    index = np.array([n[1] for n in nodes], np.int64)
    new = Entries.make(level, index, np.zeros(len(nodes), np.int32))
    kept_array = np.array(kept, np.int64)
    stay = kept_array >= 0
    for fresh_field, old_field in zip(new.arrays(), e.arrays()):
      fresh_field[stay] = old_field[kept_array[stay]]
    new.slot[~stay] = fresh
    self.entries = new

  def runs(self) -> list[list[int]]:
    """The tiling as runs [level, first index, count, action], small JSON."""
    e = self.entries
    if not len(e):
      return []
    same = (
      (np.diff(e.level) == 0)
      & (np.diff(e.index) == 1)
      & (np.diff(e.action) == 0)
    )
    first = np.concatenate([[0], np.flatnonzero(~same) + 1])
    counts = np.diff(np.concatenate([first, [len(e)]]))
    return [
      [int(e.level[a]), int(e.index[a]), int(n), int(e.action[a])]
      for a, n in zip(first, counts)
    ]

  def restore_runs(self, runs: list[list[int]], cursor: int) -> bool:
    """Takes up `runs`; False, and no change, if they do not fit.

    They fit if they tile [0, cursor) and leave room for a block.
    """
    nodes = [(l, i + k) for l, i, n, _ in runs for k in range(n)]
    edges = [(i * span_width(l), (i + 1) * span_width(l)) for l, i in nodes]
    starts = [a for a, _ in edges] + [cursor]
    stops = [0] + [b for _, b in edges]
    if starts != stops or len(nodes) > self.window - BRANCHING:
      return False
    self.retile(nodes)
    self.entries.action[:] = [a for *_, n, a in runs for _ in range(n)]
    return True

  def mark_unready(self) -> None:
    """Forgets all computed keys and values (exact mode, refresh)."""
    self.entries.ready[:] = False

  def hidden(self, attention: Attention | None = None) -> np.ndarray:
    """[E] bool: what the LM does not see: raw tokens outside of what it attends
    to, gists out of sight, and all entries that hold anything forgotten.

    Args:
      attention: what it would attend to, by default what it does.
    """
    e = self.entries
    gone = overlaps(self.forgotten, e.start(), e.start() + e.width())
    attention = attention or self.attention
    if attention is None:
      return gone | out_of_sight(e.level, self.gists_seen)
    if self.gists_seen is not None:  # nothing but what answers is read
      gone |= e.level > 0
    return gone | attention.earlier(e)[1]

  def positions(self, gist_stride: int, max_positions: int) -> np.ndarray:
    """Window-relative position of every entry, [E] int32."""
    level, hidden = self.entries.level, self.hidden()
    if self.attention is None:
      return positions_of(level, gist_stride, max_positions, hidden)
    order = self.attention.order(self.entries)
    out = np.empty(len(level), np.int32)
    out[order] = positions_of(
      level[order], gist_stride, max_positions, hidden[order])
    return out

  def next_position(self, gist_stride: int, max_positions: int) -> int:
    """Position of the token that would be appended next."""
    level = self.entries.level
    stride = effective_stride(level, gist_stride, max_positions)
    steps = np.where(level > 0, stride, 1)
    return int(steps[~self.hidden()].sum())

  def slot_arrays(
    self, gist_stride: int, max_positions: int, show_gists: bool
  ) -> tuple[np.ndarray, np.ndarray]:
    """Positions [S] int32 and visibility [S] bool in slot order."""
    e = self.entries
    positions = np.zeros(self.window, np.int32)
    visible = np.zeros(self.window, bool)
    positions[e.slot] = self.positions(gist_stride, max_positions)
    visible[e.slot] = (show_gists | (e.level == 0)) & ~self.hidden()
    return positions, visible

  def copy(self) -> WorkingContext:
    """An independent copy of the bookkeeping."""
    twin = WorkingContext(self.window)
    twin.entries = Entries(*(a.copy() for a in self.entries.arrays()))
    twin._free = list(self._free)
    twin.attention, twin.forgotten = self.attention, self.forgotten
    twin.gists_seen = self.gists_seen
    return twin

  def become(self, twin: WorkingContext) -> None:
    """Takes over the bookkeeping of a copy, which is of no use afterwards."""
    self.entries, self._free = twin.entries, twin._free
    self.attention, self.forgotten = twin.attention, twin.forgotten
