"""Runs the loop: ingest files, answer one prompt or chat, persist and resume.

  python -m experiments.run --tree=runs/book --ingest=book.txt,notes/ \
    --prompt="Who is the harbour master?"
  cat log.txt | python -m experiments.run --ingest=- --prompt="What failed?"
  python -m experiments.run --tree=runs/book           # chat with what is there
  python -m experiments.run --tree=runs/book --documents --search="harbour"

Settings: --config.loop.window=1024 and so on, see experiments/configs/run.py.
"""

from absl import flags

from mcjax.cli import commands, session

_CONFIG = commands.ConfigFlag(__file__, "run")
_TREE = flags.DEFINE_string(
  "tree", "", "Where the history lives and is resumed; in memory if empty.")
_INGEST = flags.DEFINE_list(
  "ingest", [], "Files, folders and - (standard input) to add first.")
_SUFFIXES = flags.DEFINE_list(
  "suffixes", [], "In folders, only files that end so, for instance .py,.md.")
_PROMPT = flags.DEFINE_string(
  "prompt", "", "Answer this and stop; without it, chat (/help, /quit).")
_SOURCES = flags.DEFINE_boolean(
  "sources", True, "Print after each answer what it was read from.")
_FOCUS = flags.DEFINE_boolean("focus", False, "Print the focus after it, too.")
_DOCUMENTS = flags.DEFINE_boolean("documents", False, "List the documents.")
_SEARCH = flags.DEFINE_string("search", "", "List passages that fit this.")
_FORGET = flags.DEFINE_list("forget", [], "Documents to hide for good.")
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Where telemetry.jsonl goes; nowhere if empty.")


def main(argv) -> None:
  del argv
  session.run(
    _CONFIG.value,
    tree=_TREE.value,
    ingest=_INGEST.value,
    suffixes=_SUFFIXES.value,
    prompt=_PROMPT.value,
    sources=_SOURCES.value,
    show_focus=_FOCUS.value,
    workdir=_WORKDIR.value,
    documents=_DOCUMENTS.value,
    search=_SEARCH.value,
    forget=_FORGET.value,
  )


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
