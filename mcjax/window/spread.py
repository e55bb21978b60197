"""Spread: how a decoder's rows lie on the devices of a mesh.

Rows are split over the axes of batches, key heads over `tensor` where they
divide, parameters by the rules of `parallel.sharding`. Whatever runs on the
mesh runs under the decoder's turn, since programs of several threads whose
devices wait for each other would meet. All else, embeddings, logits and the
small networks of each history, stays on one device, its home.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mcjax.base.decoder_config import DecoderConfig
from mcjax.base.load import BaseLM
from mcjax.parallel import sharding
from mcjax.parallel.sharding import TENSOR, Rules
from mcjax.types import McjaxError

ROWS, HEADS = "rows", "heads"
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Spread:
  """Where rows and heads are split; one device without a mesh.

  Attributes:
    mesh: the devices, or None.
    batch: mesh axes that rows are split over.
    heads: mesh axis of the key heads; None where each device has them all.
    home: device of what is no row's.
  """

  mesh: Mesh | None = None
  batch: tuple[str, ...] = ()
  heads: str | None = None
  home: Any = None

  @property
  def parts(self) -> int:
    """Among how many devices the rows divide."""
    size = 1
    for axis in self.batch:
      size *= self.mesh.shape[axis] if self.mesh is not None else 1
    return size

  def _spec(self, axes: Axes) -> PartitionSpec:
    names = {ROWS: self.batch, HEADS: self.heads, None: None}
    return PartitionSpec(*(names[axis] for axis in axes))

  def laid(self, tree, axes: Axes):
    """Arrays of a program with these first axes, each where it belongs."""
    if self.mesh is None:
      return tree
    return jax.lax.with_sharding_constraint(
      tree, NamedSharding(self.mesh, self._spec(axes)))

  def put(self, tree, axes: Axes):
    """The same of arrays outside of programs."""
    if self.mesh is None:
      return tree
    return jax.device_put(tree, NamedSharding(self.mesh, self._spec(axes)))

  def at_home(self, array: jax.Array) -> jax.Array:
    """An array that every device holds whole, or one does, at home."""
    if self.mesh is None:
      return array
    if len(array.devices()) > 1:
      array = array.addressable_data(0)
    return jax.device_put(array, self.home)

  def split(self, run: Callable, given: tuple[Axes, ...], gives: Axes
            ) -> Callable:
    """`run` on what each device holds of its arguments."""
    if self.mesh is None:
      return run
    return jax.shard_map(
      run, mesh=self.mesh, in_specs=tuple(map(self._spec, given)),
      out_specs=self._spec(gives), check_vma=False)

  def own(self, row: jax.Array, count: int) -> tuple[jax.Array, Any]:
    """Within `split`: a row among the `count` here, and whether it is here."""
    if self.mesh is None:
      return row, None
    at = row - jax.lax.axis_index(self.batch) * count
    return jax.numpy.clip(at, 0, count - 1), (at >= 0) & (at < count)


ALONE = Spread()


def spread_of(lm: BaseLM, mesh: Mesh | None, rules: Rules) -> Spread:
  """How an engine of this base lies on a mesh.

  Args:
    lm: the base; without a `mesh` that of its parameters is taken.
    mesh: of `parallel.sharding.make_mesh`, or None.
    rules: of parameters and batches.

  Raises:
    McjaxError: the mesh has devices of other processes.
  """
  held = lm.params["embed"].sharding
  if mesh is None and isinstance(held, NamedSharding):
    mesh = cast(Mesh, held.mesh)
  if mesh is None or mesh.size == 1:
    return ALONE
  if len({device.process_index for device in mesh.devices.flat}) > 1:
    raise McjaxError("an engine's mesh must have devices of one process only")
  home = mesh.devices.flat[0]
  if len(held.device_set) == 1:
    home = next(iter(held.device_set))
  return Spread(mesh, rules.batch, _heads(lm.config, mesh), home)


def _heads(config: DecoderConfig, mesh: Mesh) -> str | None:
  return None if config.n_kv_heads % mesh.shape[TENSOR] else TENSOR


def params_of(lm: BaseLM, spread: Spread, rules: Rules) -> dict:
  """Parameters as a decoder takes them, the gists' adapter on every device.

  Raises:
    McjaxError: they do not divide among the devices.
  """
  if spread.mesh is None:
    return lm.params
  apart = {k: a for k, a in lm.params.items() if k != "gist_adapter"}
  placed = sharding.put(apart, rules.shardings("base", apart, spread.mesh))
  if "gist_adapter" in lm.params:
    placed["gist_adapter"] = spread.put(lm.params["gist_adapter"], ())
  return placed


def at_home(lm: BaseLM, spread: Spread) -> BaseLM:
  """The base as histories use it: its vocabulary's tables on one device."""
  if spread.mesh is None or len(lm.params["embed"].devices()) == 1:
    return lm
  tables = {k: jax.device_put(lm.params[k], spread.home)
            for k in ("embed", "unembed") if k in lm.params}
  return dataclasses.replace(lm, params={**lm.params, **tables})


def check_whole(lm: BaseLM, counterfactual: bool, layers_read: int) -> None:
  """Refuses what runs the base's layers outside of a decoder, on a mesh.

  Args:
    lm: the base, see `at_home`.
    counterfactual: whether the policy tries edits out.
    layers_read: by the GistNet.

  Raises:
    McjaxError: the layers lie on several devices and are needed on one.
  """
  split = len(lm.params["layers"]["wq"].devices()) > 1
  if split and (counterfactual or layers_read):
    what = "policy oracle" if counterfactual else "this GistNet"
    raise McjaxError(f"{what} runs the base on one device: load it without "
                     "mesh= and give the mesh to the engine")
