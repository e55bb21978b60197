"""A headless browser, where there is one."""

import pathlib
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((shutil.which(n) for n in _NAMES if shutil.which(n)), None)
needs_browser = pytest.mark.skipif(FOUND is None, reason="needs Chromium")


def opened(page: pathlib.Path, folder: pathlib.Path, script: str = ""
           ) -> tuple[str, str]:
  """The page's document after its scripts ran, and what they complained of.

  Args:
    page: the file.
    folder: for the browser's own files.
    script: what a reader does, run last.
  """
  if script:
    text = page.read_text("utf-8") + f"<script>{script}</script>"
    page = folder / "acted.html"
    page.write_text(text, "utf-8")
  return visited(page.resolve().as_uri(), folder)


def visited(url: str, folder: pathlib.Path) -> tuple[str, str]:
  """As `opened`, of a page that a server has."""
  done = subprocess.run(
    [FOUND, "--headless", "--no-sandbox", "--disable-gpu",
     "--enable-logging=stderr",
     f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000",
     "--dump-dom", url],
    capture_output=True, text=True, timeout=120)
  complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  return done.stdout, "\n".join(complaints)
