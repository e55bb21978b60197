"""The mesh, and how everything lies on it: one rule per parameter name.

Three axes. `data` splits batches; `fsdp` splits batches too, and parameters
along their model width, to be gathered where they are used; `tensor` splits
heads, feed-forward width and vocabulary. XLA derives all communication from
this (GSPMD, arXiv:2105.04663). A parameter that no rule names, or one that
does not divide among the devices, is an error: nothing falls back to
replication in silence. The one exception is meant: key heads are replicated
where `tensor` has more devices than there are of them.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import re

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from mcjax.types import McjaxError

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
KEY_HEADS = "key heads"  # in rules: `tensor`, unless it exceeds the key heads
P = PartitionSpec


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None
              ) -> Mesh:
  """A data × fsdp × tensor mesh; data = -1 takes the devices that are left.

  Raises:
    McjaxError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  if min(fsdp, tensor) < 1 or (data < 1 and data != -1):
    raise McjaxError(f"mesh sizes must be positive, got data={data} "
                     f"fsdp={fsdp} tensor={tensor}")
  if data == -1:
    data = len(devices) // (fsdp * tensor)
  if data * fsdp * tensor != len(devices):
    raise McjaxError(
      f"a mesh of data={data} × fsdp={fsdp} × tensor={tensor} needs "
      f"{max(data, 1) * fsdp * tensor} devices, there are {len(devices)}")
  return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices,
                       axis_types=(AxisType.Auto,) * 3)


def _names(entry) -> tuple[str, ...]:
  """Mesh axes that one dimension is split over."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _fitted(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh
            ) -> PartitionSpec:
  """`spec` with KEY_HEADS resolved, checked against a shape."""
  if len(spec) > len(shape):
    raise McjaxError(f"sharding rule of {path} has {len(spec)} axes, the "
                     f"parameter {len(shape)}")
  sizes = dict(mesh.shape)
  entries = []
  for size, entry in zip(shape, spec, strict=False):
    if entry == KEY_HEADS:
      tensor = sizes[TENSOR]
      entry = None if tensor > size and tensor % size == 0 else TENSOR
    entries.append(entry)
    devices = int(np.prod([sizes[a] for a in _names(entry)]))
    if size % devices:
      raise McjaxError(f"{path} {list(shape)}: {size} does not divide among "
                       f"{devices} devices of axis {entry!r}")
  used = [axis for entry in entries for axis in _names(entry)]
  if len(used) != len(set(used)):
    raise McjaxError(f"sharding rule of {path} uses an axis twice: {spec}")
  return P(*entries)


def _path(keys) -> str:
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in keys)


_BASE = (
  ("embed", P(TENSOR, FSDP)),
  ("unembed", P(FSDP, TENSOR)),
  ("final_norm", P()),
  (r"layers/((attn|mlp)_(post_)?norm|q_norm|k_norm|bo)", P()),
  (r"layers/wq", P(None, FSDP, TENSOR, None)),
  (r"layers/(wk|wv)", P(None, FSDP, KEY_HEADS, None)),
  (r"layers/wo", P(None, TENSOR, None, FSDP)),
  (r"layers/bq", P(None, TENSOR, None)),
  (r"layers/(bk|bv)", P(None, KEY_HEADS, None)),
  (r"layers/(w_gate|w_up)", P(None, FSDP, TENSOR)),
  (r"layers/w_down", P(None, TENSOR, FSDP)),
)
_GISTNET = (  # the width of the network or of the base is split, over fsdp
  (r"adapter/(gain|shift)", P(None, FSDP)),
  (r"adapter/down", P(None, FSDP, None)),
  (r"adapter/up", P(None, None, FSDP)),
  (r"adapter/(lora\w*/[qkvo]|key_value)/\w+", P()),
  (r"(.*/)?norm\w*|scale|ns_coeffs", P()),  # the last belongs to Muon
  (r"position|level|slot", P(None, FSDP)),
  (r"copy_gain|context_place", P(None, None, FSDP)),
  (r".*/w_down", P(None, FSDP)),
  (r"(.*/)?(w\w+)|copy_picks", P(FSDP, None)),
)
_LENSNET = (
  (r"(score|text)/(project_gists|project_tail)/kernel", P(FSDP, None)),
  (r"keys/(vectors|salience)/kernel", P(FSDP, None)),
  (r"(score|text|keys)/.*|apart", P()),
)


@dataclasses.dataclass(frozen=True)
class Rules:
  """How base, GistNet, LensNet, their optimizers, KV and batches are split.

  Attributes:
    base, gistnet, lensnet: (pattern, spec) pairs; the first pattern that fully
      matches a parameter's path, or the end of its path in a training state,
      wins. An optimizer's moments so lie like their parameters.
    kv_slots: spec of cached keys and values [L, K, W, H].
    batch: mesh axes over which the rows of a batch are split.
  """

  base: tuple[tuple[str, PartitionSpec], ...] = _BASE
  gistnet: tuple[tuple[str, PartitionSpec], ...] = _GISTNET
  lensnet: tuple[tuple[str, PartitionSpec], ...] = _LENSNET
  kv_slots: PartitionSpec = P(None, KEY_HEADS, None, None)
  batch: tuple[str, ...] = (DATA, FSDP)

  def spec(self, part: str, path: str, shape: tuple[int, ...], mesh,
           lead: int = 0) -> PartitionSpec:
    """The spec of one parameter of "base", "gistnet" or "lensnet".

    Args:
      part: which rules.
      path: of the parameter, "layers/wq".
      shape: its shape.
      mesh: a Mesh or AbstractMesh.
      lead: axes before those that the rules speak of (weights per level).

    Raises:
      McjaxError: no rule matches, an axis is used twice, the spec is longer
        than the shape, or a dimension does not divide.
    """
    spec = next((s for p, s in getattr(self, part)
                 if re.fullmatch(rf"(?:.*/)?(?:{p})", path)), None)
    if spec is None:
      if not shape:  # a counter of the optimizer
        return P()
      raise McjaxError(f"no sharding rule matches parameter {path}")
    if not path.startswith("adapter") and "/adapter/" not in path:
      spec = P(*[None] * lead, *spec) if len(spec) else spec
    return _fitted(path, shape, spec, mesh)

  def shardings(self, part: str, tree, mesh, lead: int = 0):
    """NamedShardings of a pytree of arrays or shapes, same structure."""
    return jax.tree_util.tree_map_with_path(
      lambda keys, leaf: NamedSharding(mesh, self.spec(
        part, _path(keys), np.shape(leaf), mesh, lead)), tree)

  def kv_sharding(self, shape: tuple[int, ...], mesh) -> NamedSharding:
    """The sharding of cached keys or values [L, K, W, H]."""
    return NamedSharding(mesh, _fitted("kv", shape, self.kv_slots, mesh))

  def batch_sharding(self, mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a batch whose rows are counted along `axis`."""
    return NamedSharding(mesh, P(*[None] * axis, self.batch))

  def batch_devices(self, mesh) -> int:
    """Among how many devices the rows of a batch divide."""
    return int(np.prod([mesh.shape[a] for a in self.batch]))


RULES = Rules()


def replicated(mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def put(tree, shardings):
  """Host arrays, the same in every process, as global arrays.

  Every process only takes the parts that its own devices hold. A leaf that
  lies so already is left where it is.
  """

  def one(leaf, sharding):
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
      return leaf
    if sharding.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index])

  return jax.tree.map(one, tree, shardings)


def fetch(tree):
  """Global arrays as whole host arrays, in every process.

  All processes must call this together.
  """

  def one(leaf):
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(jax.device_get(leaf))

  return jax.tree.map(one, tree)


def global_rows(shape: tuple[int, ...], sharding: NamedSharding,
                row: Callable[..., np.ndarray], dtype=np.int32) -> jax.Array:
  """One array over all processes, of which each reads only its own rows.

  Args:
    shape: of the whole array; its last axis is never split.
    sharding: of the whole array.
    row: (indices of all axes but the last) -> [shape[-1]] values. It must
      give the same values in every process.
    dtype: of the array.
  """
  known: dict[tuple[int, ...], np.ndarray] = {}

  def part(index) -> np.ndarray:
    ranges = [range(*s.indices(n)) for s, n in zip(index, shape)][:-1]
    out = np.empty([*map(len, ranges), shape[-1]], dtype)
    for at in np.ndindex(*out.shape[:-1]):
      place = tuple(r[i] for r, i in zip(ranges, at))
      if place not in known:
        known[place] = row(*place)
      out[at] = known[place]
    return out

  return jax.make_array_from_callback(shape, sharding, part)
