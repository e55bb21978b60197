"""Renders chat templates under limits; runs as a process of its own.

A template is a program that came with a model. Reads one JSON request from
standard input and writes a JSON line per rendering. Processor time and memory
are limited by the operating system, which ends the process beyond them.
`chat_template.py` starts it, without mcjax on its path.
"""

import datetime
import json
import resource
import signal
import sys
from typing import Any

MAX_SECONDS = 0.5  # of processor time, for all renderings of a request
MAX_BYTES = 160 << 20  # of address space, the interpreter included
MAX_OUTPUT = 1 << 20  # characters of a rendering
# What a template that wants to hear of no tools may take: the field's
# convention first, then what suits templates that loop over them unasked.
_NO_TOOLS = ({"tools": None, "documents": None}, {},
             {"tools": [], "documents": []})


def _limit() -> None:
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
  signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # its signal ends us


def _environment():
  """Jinja as chat templates expect it (transformers' settings)."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's words: rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def fail(message: str):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None,
             sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                      separators=separators, sort_keys=sort_keys)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = tojson
  functions: dict[str, Any] = environment.globals
  functions["raise_exception"] = fail
  functions["strftime_now"] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  return environment


def _render(template, names: dict, job: dict) -> dict:
  """{"texts": …} of one job's message lists, or {"error": …}."""
  first = None
  for no_tools in _NO_TOOLS:
    try:
      texts = [
        template.render(
          messages=messages, add_generation_prompt=job["opening"],
          **no_tools, **names)
        for messages in job["conversations"]
      ]
    except Exception as e:  # whatever a template may raise
      first = first or _told(e)
      continue
    if max(map(len, texts)) > MAX_OUTPUT:
      return {"error": f"it writes more than {MAX_OUTPUT} characters"}
    return {"texts": texts}
  return {"error": first}


def _told(e: Exception) -> str:
  if isinstance(e, MemoryError):
    return f"it needs more than {MAX_BYTES >> 20} MB"
  if type(e).__module__.startswith("jinja2"):
    return f"{e}"[:500] or type(e).__name__
  return f"{type(e).__name__}: {e}"[:500]


def main() -> None:
  request = json.load(sys.stdin)
  sys.path[:] = request["path"]
  environment = _environment()
  _limit()
  try:
    template = environment.from_string(request["template"])
  except Exception as e:
    answers = iter([{"error": _told(e)}] * len(request["jobs"]))
  else:
    answers = (_render(template, request["names"], job)
               for job in request["jobs"])
  for answer in answers:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
