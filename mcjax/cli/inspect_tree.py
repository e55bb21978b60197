"""Tells what a stored tree holds: header, documents, levels, bytes, accesses.

  mcjax-inspect-tree URL [--span=A:B] [--json[=FILE]]

Opens it for reading only, also beside a writer. --span prints the text of
tokens A to B, which loads the base's tokenizer. Exit status: 0, or 2 for a
mistake on the command line, and where there is no tree that can be read.
"""

from __future__ import annotations

import re
import time
from typing import Any

from absl import flags

import mcjax
from mcjax.cli import commands, tree_flags
from mcjax.tree import inspection
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_SPAN = flags.DEFINE_string("span", "", "Tokens A:B whose text is wanted.")


def main(argv) -> None:
  with inspection.open_any(tree_flags.one_tree(argv)) as tree:
    facts = inspection.inspect(tree)
    if _SPAN.value:
      facts["span"] = _span(tree, facts["base"]["name"])
  tree_flags.tell(_text(facts), facts)


def _span(tree: MegaContextTree, base: str) -> dict[str, Any]:
  found = re.fullmatch(r"(\d+):(\d+)", _SPAN.value)
  start, stop = map(int, found.groups()) if found else (1, 0)
  if not start <= stop <= tree.cursor:
    raise McjaxError(f"--span={_SPAN.value} is not A:B with A <= B <="
                     f" {tree.cursor}")
  ids = tree.tokens(start, stop).tolist()
  tokenizer = mcjax.load_base_lm(tree_flags.BASE.value or base).tokenizer
  return {"start": start, "stop": stop, "token_ids": ids,
          "text": tokenizer.decode(ids)}


def _text(facts: dict[str, Any]) -> str:
  if "span" in facts:
    return facts["span"]["text"]
  lines = [
    f"{facts['url']}: {facts['tokens']:,} tokens, commit {facts['commit']},"
    f" format version {facts['version']}",
    f"base {facts['base']['name']} ({facts['base']['fingerprint']})",
    f"GistNet {facts['gistnet']['fingerprint']}, gists"
    f" {facts['gist_dtype']} [{facts['gistnet']['d_model']}]",
    f"lens keys {facts['lens'] or 'none'}",
    "",
    f"{'level':8}{'nodes':>14}{'accesses':>12}{'nodes used':>12}"
    f"{'most used':>14}",
  ]
  for level in facts["levels"]:
    most = level["most_used"]
    lines.append(
      f"L{level['level']:<7}{level['nodes']:>14,}{level['accesses']:>12,}"
      f"{level['nodes_used']:>12,}{'' if most is None else most:>14}")
  lines += ["", f"{'part':8}{'bytes':>14}{'a token':>12}{'files':>12}"]
  for part, size in facts["parts"].items():
    lines.append(f"{part:8}{size['bytes']:>14,}"
                 f"{size['bytes_a_token']:>12.2f}{size['files']:>12,}")
  lines += ["", f"{len(facts['documents'])} documents,"
            f" {facts['forgotten_tokens']:,} tokens forgotten"]
  for d in facts["documents"]:
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(d["time"]))
    lines.append(f"{day}  {d['start']:>12,}:{d['stop']:<12,}  {d['name']}")
  return "\n".join(lines)


def cli() -> None:
  commands.run(main, rest=True, status=2, flags_of=(tree_flags.__name__,))


if __name__ == "__main__":
  cli()
