"""A session on the command line: open a history, add documents, talk to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import signal
import sys
import threading
import time

from tqdm import tqdm

from mcjax.base.load import BaseLM, load_base_lm
from mcjax.cli import focus_page
from mcjax.cli.focus_map import Section, focus_map, source_lines
from mcjax.config import Config
from mcjax.gist.encoder import load_gistnet
from mcjax.lens.policy import load_lensnet
from mcjax.parallel.places import local
from mcjax.runtime.documents import Document
from mcjax.runtime.megacontext import MegaContext
from mcjax.runtime.text_files import TextFile, read_documents
from mcjax.settings import read_fields
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError


def run(config, *, tree: str, ingest: Sequence[str], suffixes: Sequence[str],
        prompt: str, show_focus: bool, workdir: str, documents: bool = False,
        search: str = "", forget: Sequence[str] = ()) -> None:
  """Opens or creates the history, ingests, then answers or chats.

  Asked to list, search or forget documents, it does that instead of a chat.

  Args:
    config: ConfigDict with base, dtype, gistnet, lensnet, max_new_tokens and
      loop.
    tree: url of the history; in memory if empty.
    ingest: files, folders and "-".
    suffixes: of files in folders.
    prompt: one question; chat if empty.
    show_focus: print after every answer what it was read from, and the focus.
    workdir: folder of telemetry.jsonl and of what tools/view_focus shows, or
      "".
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
      print(_listing(mc.documents()))
    if search:
      print(source_lines(mc.search(search)) if mc.cursor else "")
    try:
      if prompt:
        _answer(mc, prompt, config.max_new_tokens, show_focus)
      elif not (documents or search or forget):
        _chat(mc, config.max_new_tokens, show_focus)
    finally:
      if workdir:
        focus_page.keep_texts(local(workdir), mc.text, mc.cursor)


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


def _listing(documents: Sequence[Document]) -> str:
  """A line for each document: when it came in, its size, its name."""
  lines = []
  for d in documents:
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(d.time))
    lines.append(f"{day}  {d.stop - d.start:>10,} tokens  {d.name}")
  return "\n".join(lines)


def _sections(mc: MegaContext) -> list[Section]:
  """The history cut into documents and what lies between them."""
  sections, at = [], 0
  for d in mc.documents():
    if d.start > at:
      sections.append(Section("(conversation)", at, d.start))
    sections.append(Section(d.name, d.start, d.stop))
    at = d.stop
  if mc.cursor > at:
    sections.append(Section("(conversation)", at, mc.cursor))
  return sections


def _answer(mc, prompt, max_new_tokens, show_focus) -> None:
  with _interruptible() as check:

    def on_piece(piece: str) -> None:
      print(piece, end="", flush=True)
      check()

    out = mc.generate(prompt, max_new_tokens, on_piece=on_piece)
  print()
  if show_focus:
    print("Read from:\n" + source_lines(out.sources), file=sys.stderr)
    print(focus_map(mc.focus(), _sections(mc)), file=sys.stderr)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
  """Lets Ctrl-C end an answer where it can be ended cleanly.

  Yields a function to call there, which raises KeyboardInterrupt once Ctrl-C
  was pressed. Pressed again it interrupts at once.
  """
  pressed = False

  def note(number, frame) -> None:
    nonlocal pressed
    if pressed:
      raise KeyboardInterrupt
    pressed = True

  def check() -> None:
    if pressed:
      raise KeyboardInterrupt

  if threading.current_thread() is not threading.main_thread():
    yield check
    return
  kept = signal.signal(signal.SIGINT, note)
  try:
    yield check
  finally:
    signal.signal(signal.SIGINT, kept)


def _chat(mc, max_new_tokens, show_focus) -> None:
  """Reads prompts until the end of standard input or an empty line."""
  interactive = sys.stdin.isatty()
  if interactive:
    print("An empty line or Ctrl-D ends the chat, Ctrl-C an answer.",
          file=sys.stderr)
  while True:
    try:
      prompt = input("> " if interactive else "")
      if prompt.strip():
        _answer(mc, prompt, max_new_tokens, show_focus)
      elif interactive:
        break
    except EOFError:
      break
    except KeyboardInterrupt:
      if not interactive:
        raise
      print()
