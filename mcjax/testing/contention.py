"""Processes that want the same tree at once: two writers, one and readers.

As `torture`, from which they are forked: in a process that never uses
TensorStore itself.
"""

from __future__ import annotations

import json
import time

import numpy as np

from mcjax.testing import tree_reference as reference
from mcjax.testing.torture import (
  encoder,
  encoder_of,
  event,
  forked,
  open_or_create,
  result,
  stream,
)
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_OWN = 100  # token ids of a writer
_LONGEST = 200_000  # tokens of the tree that readers look at


def _write_in_turn(url: str, writer: int, commits: int, seed: int) -> str:
  """Commits so often, a few times each time it is let in; JSON of counts."""
  rng, done, refusals, slowest = np.random.default_rng(seed), 0, 0, 0.0
  while done < commits:
    begin = time.monotonic()
    try:
      tree = open_or_create(url)
    except McjaxError as error:
      slowest = max(slowest, time.monotonic() - begin)
      if not _is_refusal(str(error)):
        return json.dumps({"failed": str(error)})
      refusals += 1
      time.sleep(rng.exponential(0.01))
      continue
    for _ in range(min(int(rng.integers(1, 6)), commits - done)):
      ids = _OWN * writer + rng.integers(0, _OWN, int(rng.integers(1, 400)))
      start = tree.cursor
      tree.append(ids)
      tree.journal.add("document", start=start, stop=tree.cursor,
                       writer=writer, number=done)
      tree.commit()
      done += 1
    tree.close()
  return json.dumps({"commits": done, "refused": refusals,
                     "slowest_refusal_s": slowest})


def _is_refusal(message: str) -> bool:
  """Whether it says by whom, where and since when; or that one was faster."""
  known = "is open for writing" in message and (
    "by process" in message and " for " in message or " by " not in message)
  return known or "already holds a tree" in message


def _mixed(url: str, writers: int) -> str:
  """JSON: commits found of each writer, and those that hold other tokens."""
  with MegaContextTree.open(
    url, encoder=encoder_of(url), mode="r", **reference.BASE) as tree:
    events = tree.journal.events
    ids = tree.tokens(0, tree.cursor)
    ends = [0, *(e["stop"] for e in events)]
    mixed = 0
    for before, e in zip(ends, events, strict=False):
      own = ids[e["start"] : e["stop"]] // _OWN == e["writer"]
      mixed += e["start"] != before or not own.all()
    numbers = [[e["number"] for e in events if e["writer"] == w]
               for w in range(writers)]
    mixed += any(n != list(range(len(n))) for n in numbers)
    reference.check(tree, ids, encoder_of(url))
    whole = ends[-1] == tree.cursor
  return json.dumps({"found": [len(n) for n in numbers], "mixed": mixed,
                     "whole": whole})


def two_writers(url: str, commits: int, seed: int) -> dict:
  """Two processes contend for a tree until each has its half of the commits.

  Returns:
    commits reported and found, those mixed, refusals, the slowest of them.

  Raises:
    McjaxError: a writer failed by anything but a refusal.
  """
  half = (commits + 1) // 2
  children = [forked(_write_in_turn, url, w, half, seed + w) for w in (0, 1)]
  said = [json.loads(result(child)[0]) for child in children]
  if failed := [s["failed"] for s in said if "failed" in s]:
    raise McjaxError(f"a writer failed: {failed[0]}")
  found = json.loads(result(forked(_mixed, url, 2))[0])
  reported = [s["commits"] for s in said]
  return {
    "commits": sum(reported), "lost": sum(reported) - sum(found["found"]),
    "mixed": found["mixed"] + (not found["whole"]),
    "refused": sum(s["refused"] for s in said),
    "slowest_refusal_s": max(s["slowest_refusal_s"] for s in said),
  }


def _write_on(url: str, end: float, seed: int) -> str:
  """Commits and rebuilds until a time; JSON of how often."""
  rng, commits, rebuilds = np.random.default_rng(seed), 0, 0
  with open_or_create(url) as tree:
    while time.monotonic() < end:
      if tree.cursor < _LONGEST:
        count = int(rng.choice([1, 33, 400, 3000]))
        tree.append(stream(tree.cursor, tree.cursor + count))
      number = len(tree.journal.events)
      tree.journal.add(**event(number))
      tree.commit({"cursor": tree.cursor, "events": number + 1})
      commits += 1
      if rng.random() < 0.02:
        tree.rebuild_gists(encoder(int(rng.integers(5))))
        rebuilds += 1
  return json.dumps({"commits": commits, "rebuilds": rebuilds})


def _read_on(url: str, end: float, seed: int) -> str:
  """Reads at random and refreshes until a time; JSON of what was seen."""
  rng, reads, commits, behind, tree = np.random.default_rng(seed), 0, 0, 0, None
  while time.monotonic() < end:
    try:
      if tree is None or rng.random() < 0.05:
        tree = MegaContextTree.open(
          url, encoder=None, mode="r", **reference.BASE)
      commits += tree.refresh()
      for _ in range(4):
        _read_somewhere(tree, rng)
        reads += 1
    except McjaxError as error:
      if tree is None or not tree.refresh():  # nothing newer: so it is torn
        return json.dumps({"torn": str(error)})
      behind += 1
    except AssertionError as error:
      return json.dumps({"torn": str(error).strip().splitlines()[0]})
  return json.dumps({"reads": reads, "commits": commits, "behind": behind})


def _read_somewhere(tree: MegaContextTree, rng: np.random.Generator) -> None:
  """Raises AssertionError unless what is read belongs to the commit."""
  cursor, events = tree.cursor, len(tree.journal.events)
  if tree.extra:
    assert tree.extra == {"cursor": cursor, "events": events}, "half a commit"
  start = int(rng.integers(0, cursor + 1))
  stop = int(rng.integers(start, min(start + 5000, cursor) + 1))
  for low, high in ((start, stop), (max(0, cursor - 50), cursor)):
    right = stream(low, high)
    assert np.array_equal(tree.tokens(low, high), right), f"{low}:{high}"
  assert tree.journal.events == [event(n) for n in range(events)], "events"
  blocks = tree.num_nodes(1)
  if not blocks:
    return
  first = int(rng.integers(0, blocks))
  last = min(blocks, first + 40)
  name = tree.gistnet_fingerprint
  ids = stream(32 * first, 32 * last).reshape(-1, 32)
  right = encoder(int(name.split("-")[1])).encode_tokens(ids)
  right = reference.round_trip("bfloat16")(right)
  assert np.array_equal(tree.gists(1, first, last), right), "gists"


def readers(url: str, count: int, seconds: float, seed: int) -> dict:
  """One process writes, others read, for so many seconds.

  Returns:
    commits, rebuilds, reads, commits seen by readers, how often a reader was
    behind (a rebuild had deleted what it read) and what was torn.
  """
  for each in range(5):
    encoder(each)
  result(forked(lambda: open_or_create(url).close()))
  end = time.monotonic() + seconds
  writer = forked(_write_on, url, end, seed)
  children = [forked(_read_on, url, end, seed + 1 + n) for n in range(count)]
  said = [result(child)[0] for child in children]
  wrote = json.loads(result(writer)[0])
  seen = [json.loads(s) if s.startswith("{") else {"torn": s} for s in said]
  names = ("reads", "commits", "behind")
  total = {name: sum(s.get(name, 0) for s in seen) for name in names}
  return {**wrote, "reads": total["reads"], "seen": total["commits"],
          "behind": total["behind"], "torn": [
            s["torn"] for s in seen if "torn" in s]}
