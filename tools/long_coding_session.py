"""The demo: a long coding session behind a small frozen model.

Ingests the running Python's standard library and one handbook of made-up
facts, then asks about one part, shifts to another, and comes back. Shows the
answers, and what the model sees before and after each of them.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import sysconfig
import time

from absl import flags
from tqdm import tqdm

import mcjax
from mcjax.cli import commands
from mcjax.cli.focus_map import Section, focus_map, source_lines
from mcjax.runtime import telemetry
from mcjax.runtime.text_files import TextFile, read_documents

_BASE = flags.DEFINE_string(
  "base", "smollm2-135m",
  "A named base, for instance qwen2.5-coder-1.5b, a folder or a .gguf file.")
_TREE = flags.DEFINE_string(
  "tree", "", "Where the history lives; runs/demo, with the name of another "
  "base behind it, if empty.")
_TOKENS = flags.DEFINE_integer(
  "tokens", 120_000, "Least tokens of standard library to ingest.", 1000
)
_WINDOW = flags.DEFINE_integer("window", 2048, "Slots of the working context.")
_FRESH = flags.DEFINE_boolean("fresh", False, "Forget the history first.")

_HANDBOOK = pathlib.Path(__file__).parent / "demo_files/harbour_handbook.md"
_TURNS = (  # a question and what its answer must name
  ("What is the access code of the pump house?", "7314"),
  ("Who is the chief pilot of the harbour?", "Marit Solheim"),
  ("On which port does the tide service listen?", "48210"),
  ("What is the call sign of the signal tower?", "Copper Heron"),
  ("Where are backups of the movement database stored?", "Reykjavik"),
  ("From which berth does the ferry to Skarvoy leave?", "17"),
)
_LEGEND = """
Focus lists how many slots of the window show which level: L0 raw tokens, L1
gists of 32 tokens each, L2 gists of 1,024, and so on. Below that stands a line
for every document that is seen in detail: the finest level of each of 48 parts,
then which of its tokens are raw.
"""


def _library() -> list[TextFile]:
  """Standard library modules, the largest passed over, in a fixed order."""
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  files = sorted(folder.glob("*.py"))
  return [d for f in files for d in read_documents([str(f)])
          if 4_000 < len(d.text) < 60_000]


def _ingest(mc: mcjax.MegaContext) -> list[Section]:
  """Library, handbook in the middle, library; returns what is where."""
  library = _library()
  handbook = next(read_documents([str(_HANDBOOK)]))
  sections: list[Section] = []
  begin = time.perf_counter()
  with tqdm(total=_TOKENS.value, unit="tok", unit_scale=True,
            desc="Ingesting") as bar:
    planted = False
    while mc.cursor < _TOKENS.value and library:
      if not planted and mc.cursor > _TOKENS.value // 3:
        document, planted = handbook, True
      else:
        document = library.pop(0)
      start, name = mc.cursor, pathlib.Path(document.name).name
      mc.ingest(f"# File: {name}\n\n{document.text}\n", name=name)
      sections.append(Section(name, start, mc.cursor))
      bar.update(mc.cursor - start)
  seconds = time.perf_counter() - begin
  print(f"Ingested {mc.cursor:,} tokens in {seconds:.1f} s: "
        f"{mc.cursor / seconds:,.0f} tokens/s")
  return sections


def _place(lm) -> pathlib.Path:
  """Folder of the history: a base has one of its own."""
  own = "" if lm.name == _BASE.default else f"-{lm.name}"
  return pathlib.Path(_TREE.value or f"runs/demo{own}")


def _open(lm) -> tuple[mcjax.MegaContext, list[Section]]:
  tree = _place(lm)
  listing = tree.with_name(tree.name + ".sections.json")
  if _FRESH.value:
    shutil.rmtree(tree, ignore_errors=True)
    listing.unlink(missing_ok=True)
  if listing.exists():
    mc = mcjax.MegaContext.open(str(tree), lm)
    sections = [Section(*s) for s in json.loads(listing.read_text())]
    print(f"Resumed {tree} with {mc.cursor:,} tokens; nothing to ingest. "
          "(--fresh starts over.)")
    return mc, sections
  shutil.rmtree(tree, ignore_errors=True)  # an ingest that was cut off
  tree.parent.mkdir(parents=True, exist_ok=True)
  config = mcjax.Config(window=_WINDOW.value)
  mc = mcjax.MegaContext.create(str(tree), lm, config)
  sections = _ingest(mc)
  listing.write_text(json.dumps(sections))
  return mc, sections


def main(argv) -> None:
  del argv
  lm = mcjax.load_base_lm(_BASE.value)
  mc, sections = _open(lm)
  window = mc.config.window
  print(f"Base {lm.name}, window {window} slots, policy {mc.policy}, "
        f"history {mc.cursor:,} tokens: modules of Python's standard library "
        "and, among them, a made-up handbook of a harbour.")
  print(_LEGEND)
  held, decoded, seconds = [], 0, 0.0
  for turn, (question, fact) in enumerate(_TURNS, 1):
    print(f"--- Turn {turn}: {question}\nFocus before:")
    print(focus_map(mc.focus(), sections))
    start = mc.cursor
    out = mc.generate(question, max_new_tokens=40)
    sections.append(Section(f"(turn {turn})", start, mc.cursor))
    held.append(fact.lower() in out.text.lower())
    decoded += len(out.token_ids)
    seconds += out.seconds - out.first_token_seconds
    print(f"Answer: {out.text.strip()}\nRead from:\n"
          + source_lines(out.sources))
    print(f"Planted fact '{fact}': {'held' if held[-1] else 'MISSING'}; "
          f"first token after {out.first_token_seconds:.2f} s, window use "
          f"{len(mc.focus()) / window:.0%}\nFocus after:")
    print(focus_map(mc.focus(), sections) + "\n")
  summary = mc.telemetry.summary()
  sizes = mc.tree.nbytes_on_disk()
  cursor = mc.cursor
  mc.close()
  total = sum(sizes.values())
  print(f"{sum(held)} of {len(held)} planted facts held, from a history of "
        f"{cursor:,} tokens through a window of {window}.")
  print(f"Decode {decoded / seconds:.1f} tokens/s; "
        f"{summary['swap_rate']:.2f} edits per refocus step.")
  print(f"Tree on disk {total / 2**20:.1f} MiB ({total / cursor:.1f} B a "
        "token: " + ", ".join(f"{k} {v / cursor:.1f}" for k, v in
                              sizes.items()) + ").")
  print(f"Peak memory {telemetry.peak_memory_mib():,.0f} MiB.")
  sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
  commands.run(main)
