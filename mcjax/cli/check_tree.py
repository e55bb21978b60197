"""Checks a stored tree; repairs or compacts it if asked to.

  mcjax-check-tree URL [--repair] [--compact] [--json[=FILE]]

Every row of every array is held against its checksums, and all that follows
from something else is computed again. Exit status: 0 clean, 1 damaged, 2 a
mistake on the command line, or no such tree.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags

import mcjax
from mcjax.cli import commands, tree_flags
from mcjax.lens.policy import load_keyer
from mcjax.tree import check as checking
from mcjax.tree import compaction, repair
from mcjax.types import McjaxError

_REPAIR = flags.DEFINE_bool(
  "repair", False, "Make anew what follows from what is still there.")
_COMPACT = flags.DEFINE_bool(
  "compact", False, "Merge small files, and erase the text of forgotten "
  "documents.")
_GISTNET = flags.DEFINE_string(
  "gistnet", "", "GistNet weights; the shipped ones.")
_LENSNET = flags.DEFINE_string(
  "lensnet", "", "LensNet weights; the shipped ones.")


def main(argv) -> None:
  url = tree_flags.one_tree(argv)
  report = checking.check(url)
  done: dict[str, Any] = {"repaired": [], "compacted": None}
  if _REPAIR.value and report.findings:
    report, done["repaired"] = repair.repair(url, lambda: _models(report))
  if _COMPACT.value and not report.damage:
    done["compacted"] = vars(
      compaction.compact(url, lambda: _models(report)))
    report = checking.check(url)
  tree_flags.tell(_summary(report, done), report.as_json() | done)
  sys.exit(1 if report.damage else 0)


def _models(report: checking.Report):
  """The tree's GistNet, and what makes its lens keys."""
  base = report.record["base"]
  lm = mcjax.load_base_lm(tree_flags.BASE.value or base["name"])
  if lm.fingerprint != base["fingerprint"]:
    raise McjaxError(
      f"{report.url} was made with the base LM {base['name']}"
      f" ({base['fingerprint']}), not with {lm.name}: give --base")
  encoder = mcjax.load_gistnet(lm, _GISTNET.value or None)
  if not report.record.get("lens"):
    return encoder, None
  return encoder, load_keyer(lm, _LENSNET.value or None)


def _summary(report: checking.Report, done: dict[str, Any]) -> str:
  lines = [f"done: {line}" for line in done["repaired"]]
  if packed := done["compacted"]:
    lines.append(
      f"done: {packed['files_before']} files are {packed['files_after']},"
      f" {packed['erased']} forgotten tokens erased")
  for finding in report.findings:
    kind = "note" if finding.harmless else "DAMAGE"
    lines.append(f"{kind}: {finding}"
                 + (" (--repair)" if finding.mend else ""))
  state = "damaged" if report.damage else "clean"
  rows = sum(report.rows.values())
  lines.append(
    f"{report.url}: {state}; {report.record.get('cursor', 0):,} tokens,"
    f" {rows:,} rows checked in {report.seconds:.1f} s")
  return "\n".join(lines)


def cli() -> None:
  commands.run(main, rest=True, status=2, flags_of=(tree_flags.__name__,))


if __name__ == "__main__":
  cli()
