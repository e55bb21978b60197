"""Training checkpoints; the only importer of Orbax.

A checkpoint holds a state pytree and, as JSON, the configuration it belongs
to. Saving is synchronous at the end of a call to `save(..., wait=True)`, so a
process that is told to stop leaves a whole checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import orbax.checkpoint as ocp

from mcjax.parallel.places import place
from mcjax.types import McjaxError


def _shapes(tree) -> dict[str, list]:
  """{path: [dtype, sizes…]} of a pytree of arrays."""
  return {jax.tree_util.keystr(path): [str(leaf.dtype), *leaf.shape]
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _change(old, new, name: str) -> str | None:
  """The first difference of two plain values: "name=old, not new"."""
  if isinstance(old, dict) and isinstance(new, dict):
    pairs = [(f"{name}.{k}", old.get(k), new.get(k))
             for k in sorted(set(old) | set(new))]
  elif isinstance(old, list) and isinstance(new, list) and (
      len(old) == len(new)):
    pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(old, new))]
  elif isinstance(old, float) and isinstance(new, float) and math.isclose(
      old, new, rel_tol=1e-6):  # measured, and rounded otherwise elsewhere
    return None
  else:
    return None if old == new else f"{name}={old}, this run has {new}"
  return next((c for n, a, b in pairs if (c := _change(a, b, n))), None)


class Checkpoints:
  """The checkpoints of one run, newest kept.

  Args:
    folder: where they live; created if missing.
    config: the run's configuration as plain JSON values, saved with each.
    keep: how many of the newest to keep.
    keep_every: steps between checkpoints that stay for good; 0 for none.
  """

  def __init__(self, folder, config: dict[str, Any], keep: int = 3,
               keep_every: int = 0):
    self._config = config
    self._manager = ocp.CheckpointManager(
      place(folder),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, keep_period=keep_every or None, create=True))

  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state, wait: bool = False) -> None:
    """Saves `state` as the checkpoint of `step`; a no-op if it exists."""
    if step != self._manager.latest_step():
      self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        config=ocp.args.JsonSave(
          {"run": self._config, "shapes": _shapes(state)})))
    if wait:
      self._manager.wait_until_finished()

  def restore(self, like, must_match: tuple[str, ...] = (),
              may_not_change: tuple[str, ...] = ()):
    """The newest state, laid out and sharded as `like`; None if there is none.

    Args:
      like: pytree of arrays with the wanted shapes, dtypes and shardings.
      must_match: names of configuration entries that may not have changed.
      may_not_change: as `must_match`, for those that a user may choose to
        change (`accept_changes`); what older checkpoints lack is not compared.

    Raises:
      McjaxError: the run in this folder had another configuration or shape.
    """
    step = self.latest_step()
    if step is None:
      return None
    saved = self._manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
    for name in must_match + may_not_change:
      optional = name in may_not_change
      if optional and name not in saved["run"]:
        continue
      change = _change(saved["run"].get(name), self._config.get(name), name)
      if change:
        raise McjaxError(
          f"the checkpoint of step {step} was written with {change}; " + (
            "set accept_changes to go on from it all the same, or use another "
            "workdir" if optional else "use another workdir"))
    wanted = _shapes(like)
    for name in sorted(set(wanted) | set(saved["shapes"])):
      if wanted.get(name) != saved["shapes"].get(name):
        raise McjaxError(
          f"the checkpoint of step {step} does not fit this run: {name} is "
          f"{saved['shapes'].get(name)} there and {wanted.get(name)} here")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._manager.restore(step, args=ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract)))["state"]

  def close(self) -> None:
    """Waits for writes and releases the folder."""
    self._manager.wait_until_finished()
    self._manager.close()
