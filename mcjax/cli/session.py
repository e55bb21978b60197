"""A session on the command line: open a history, add documents, talk to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import difflib
import pathlib
import sys

from tqdm import tqdm

from mcjax.base.load import BaseLM, load_base_lm
from mcjax.cli import focus_page
from mcjax.cli.chat import Chat, document_lines
from mcjax.cli.focus_map import source_lines
from mcjax.config import Config
from mcjax.gist.encoder import load_gistnet
from mcjax.lens.policy import load_lensnet
from mcjax.parallel.places import local
from mcjax.runtime.megacontext import MegaContext
from mcjax.runtime.text_files import TextFile, read_documents
from mcjax.settings import read_fields
from mcjax.tree.places import locate
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError


def run(config, *, tree: str, ingest: Sequence[str], suffixes: Sequence[str],
        prompt: str, show_focus: bool, workdir: str, sources: bool = True,
        documents: bool = False, search: str = "", forget: Sequence[str] = ()
        ) -> None:
  """Opens or creates the history, ingests, then answers or chats.

  Asked to list, search or forget documents, it does that instead of a chat.

  Args:
    config: ConfigDict with base, dtype, gistnet, lensnet, max_new_tokens and
      loop.
    tree: url of the history; in memory if empty.
    ingest: files, folders and "-".
    suffixes: of files in folders.
    prompt: one question; chat if empty.
    show_focus: print the focus after every answer.
    workdir: folder of telemetry.jsonl and of what tools/view_focus shows, or
      "".
    sources: print after every answer what it was read from.
    documents: list them.
    search: list passages that fit this.
    forget: names of documents to hide for good, first of all.

  Raises:
    McjaxError: a user's mistake.
  """
  values = config.loop.to_dict()
  if workdir:
    local(workdir).mkdir(parents=True, exist_ok=True)
    values["telemetry_path"] = str(local(workdir) / "telemetry.jsonl")
  loop = read_fields(Config, "loop", values)
  if "-" in ingest and not prompt:
    raise McjaxError("--ingest=- takes standard input, so it needs --prompt")
  asked = prompt or documents or search or forget
  _check_there(tree, begins=bool(ingest) or not asked)
  files = list(read_documents(ingest, suffixes)) if ingest else []
  lm = load_base_lm(config.base, dtype=config.dtype)
  with _history(tree, lm, loop, **_weights(config, lm)) as mc:
    for name in forget:
      print(f"Forgotten: {name} ({len(mc.forget(name))})", file=sys.stderr)
    _ingest(mc, files)
    if not mc.cursor:
      print("The history is empty; ingest something with --ingest=FILE.",
            file=sys.stderr)
    if documents:
      print(document_lines(mc))
    if search:
      found = mc.search(search) if mc.cursor else []
      print(source_lines(found) if found else "  nothing found")
    chat = Chat(mc, config.max_new_tokens, sources, show_focus)
    try:
      if prompt:
        chat.answer(prompt)
      elif not asked:
        chat.run()
    finally:
      if workdir:
        focus_page.keep_texts(local(workdir), mc.text, mc.cursor)


def _check_there(tree: str, begins: bool) -> None:
  """Tells of a place without a history, which may be a misspelt one.

  Args:
    tree: url of the history; "" is in memory.
    begins: whether one may be begun there.

  Raises:
    McjaxError: nothing is there, and none may be begun.
  """
  if not tree or tree.startswith("memory://") or MegaContextTree.exists(tree):
    return
  near = _neighbour(tree)
  hint = f"; did you mean {near}?" if near else ""
  if not begins:
    raise McjaxError(f"--tree: there is no history at {tree}"
                     + (hint or "; --ingest=FILE begins one"))
  print(f"A new history begins at {tree}{hint}", file=sys.stderr)


def _neighbour(tree: str) -> str:
  """The history beside a place that is named most like it; "" if none is."""
  folder = locate(tree).folder
  if folder is None or not folder.parent.is_dir():
    return ""
  names = [p.name for p in folder.parent.iterdir() if p.is_dir()]
  near = difflib.get_close_matches(folder.name, names, 3, 0.5)
  there = [str(pathlib.Path(tree.removeprefix("file://")).with_name(name))
           for name in near]
  return next(filter(MegaContextTree.exists, there), "")


def _weights(config, lm: BaseLM) -> dict:
  """GistNet and LensNet of the user's own, as `MegaContext` takes them."""
  gistnet = load_gistnet(lm, config.gistnet or None)
  lensnet = None
  if config.lensnet:
    lensnet = load_lensnet(lm, config.lensnet, gistnet=gistnet)
  return {"gistnet": gistnet, "lensnet": lensnet}


def _history(tree: str, lm: BaseLM, loop: Config, **weights) -> MegaContext:
  if not tree:
    return MegaContext.create("memory://session/", lm, loop, **weights)
  if MegaContextTree.exists(tree):
    mc = MegaContext.open(tree, lm, loop, **weights)
    print(f"Resumed {tree}: {mc.cursor:,} tokens.", file=sys.stderr)
    return mc
  return MegaContext.create(tree, lm, loop, **weights)


def _ingest(mc: MegaContext, files: Sequence[TextFile]) -> None:
  total = sum(len(file.text) for file in files)
  known = 0
  with tqdm(total=total, unit="B", unit_scale=True, desc="Ingesting",
            disable=not files) as bar:
    for file in files:
      if file.replaced:
        tqdm.write(f"{file.name}: {file.replaced} bytes are not UTF-8 "
                   "and were replaced", file=sys.stderr)
      if not file.text:
        tqdm.write(f"{file.name} is empty: passed over", file=sys.stderr)
        continue
      done = bar.n + len(file.text)
      known += mc.ingest(
        file.text, _within(bar, len(file.text)), name=file.name).skipped
      bar.update(done - bar.n)
  if known:
    print(f"{known} of {len(files)} files are in the history already: passed "
          "over", file=sys.stderr)


def _within(bar: tqdm, size: int) -> Callable[[int, int], None]:
  """Moves a bar through the next `size` of it, as tokens are done."""
  begin = bar.n

  def told(done: int, tokens: int) -> None:
    bar.update(begin + size * done // tokens - bar.n)

  return told
