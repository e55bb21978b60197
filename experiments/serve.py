"""Serves histories over HTTP: OpenAI's API, documents, search, a page.

  python -m experiments.serve --config=serve --config.root=runs/histories

Then http://127.0.0.1:8080 in a browser, or any client of OpenAI's API with
base_url="http://127.0.0.1:8080/v1"; the request's `user` or the header
X-Mcjax-History names the history. MCJAX_API_KEY, where it is set, must be the
clients' key. Needs the extra "serve".
"""

from mcjax.cli import commands
from mcjax.serve.run import run

_CONFIG = commands.ConfigFlag(__file__, "serve")


def main(argv) -> None:
  del argv
  run(_CONFIG.value)


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
