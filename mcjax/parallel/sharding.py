"""The mesh and how parameters lie on it: one rule per parameter name.

Axes: `data` splits batches, `model` splits heads, feed-forward width and
vocabulary. A parameter that no rule names, or one that does not divide among
the devices, is an error: nothing falls back to replication in silence.
"""

from __future__ import annotations

import dataclasses
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from mcjax.types import McjaxError

DATA, MODEL = "data", "model"
P = PartitionSpec


def make_mesh(data: int = -1, model: int = 1, devices=None) -> Mesh:
  """A data × model mesh; data = -1 takes the devices that are left.

  Raises:
    McjaxError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  if model < 1 or (data < 1 and data != -1):
    raise McjaxError(f"mesh sizes must be positive, got data={data} "
                     f"model={model}")
  if data == -1:
    data = len(devices) // model
  if data * model != len(devices):
    raise McjaxError(f"a mesh of data={data} × model={model} needs "
                     f"{max(data, 1) * model} devices, there are "
                     f"{len(devices)}")
  return jax.make_mesh((data, model), (DATA, MODEL), devices=devices,
                       axis_types=(AxisType.Auto, AxisType.Auto))


@dataclasses.dataclass(frozen=True)
class Rules:
  """(pattern, spec) pairs; the first pattern that fully matches a path wins."""

  rules: tuple[tuple[str, PartitionSpec], ...]

  def spec(self, path: str, shape: tuple[int, ...], mesh: Mesh
           ) -> PartitionSpec:
    """The spec of one parameter.

    Raises:
      McjaxError: no rule matches, an axis is used twice, the spec is longer
        than the shape, or a dimension does not divide.
    """
    spec = next((s for p, s in self.rules if re.fullmatch(p, path)), None)
    if spec is None:
      raise McjaxError(f"no sharding rule matches parameter {path}")
    used = [axis for axis in spec if axis is not None]
    if len(used) != len(set(used)):
      raise McjaxError(f"sharding rule of {path} uses an axis twice: {spec}")
    if len(spec) > len(shape):
      raise McjaxError(f"sharding rule of {path} has {len(spec)} axes, the "
                       f"parameter {len(shape)}")
    for size, axis in zip(shape, spec, strict=False):
      if axis is not None and size % mesh.shape[axis]:
        raise McjaxError(f"{path} {list(shape)}: {size} does not divide among "
                         f"{mesh.shape[axis]} devices of axis {axis!r}")
    return spec

  def shardings(self, tree, mesh: Mesh):
    """NamedShardings of a pytree of arrays or shapes, same structure."""

    def one(path, leaf):
      name = "/".join(str(getattr(k, "key", getattr(k, "name", k)))
                      for k in path)
      return NamedSharding(mesh, self.spec(name, np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


BASE_RULES = Rules((
  ("embed", P(MODEL, None)),
  ("unembed", P(None, MODEL)),
  ("final_norm", P()),
  (r"layers/(attn_norm|mlp_norm|q_norm|k_norm|bo)", P()),
  (r"layers/(wq|wk|wv)", P(None, None, MODEL, None)),
  (r"layers/wo", P(None, MODEL, None, None)),
  (r"layers/(bq|bk|bv)", P(None, MODEL, None)),
  (r"layers/(w_gate|w_up)", P(None, None, MODEL)),
  (r"layers/w_down", P(None, MODEL, None)),
))
REPLICATED_RULES = Rules(((r".*", P()),))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """One axis split over `data`."""
  return NamedSharding(mesh, P(*[None] * axis, DATA))


def global_batch(local: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
  """One array over all processes from every process's part of `axis`."""
  return jax.make_array_from_process_local_data(
    batch_sharding(mesh, axis), local)
