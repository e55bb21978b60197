"""Checks shapes and dtypes of arrays at every call, and no other annotation."""

import re

import beartype

# Names of jaxtyping in an annotation, as in Float[Array, "T D"].
_SHAPED = re.compile(r"\b(Bool|Float|Int|Key|UInt)\d*\[")


def check(function):
  """A type checker for `jaxtyping.install_import_hook`."""
  function.__annotations__ = {
    name: hint for name, hint in function.__annotations__.items()
    if _SHAPED.search(str(hint))}
  return beartype.beartype(function)
