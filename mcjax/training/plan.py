"""What a run would take on every device of a mesh, without taking it.

Sizes come from shapes alone (`jax.eval_shape`), so a base of any size is
planned on a laptop, from its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
import numpy as np

from mcjax.base.decoder_config import DecoderConfig
from mcjax.base.layout import param_shapes
from mcjax.base.load import load_decoder_config
from mcjax.gist import weights as gist_weights
from mcjax.lens import network as lensnet
from mcjax.parallel.sharding import AXES, RULES, Rules, make_mesh
from mcjax.training.gist.run_config import (
  TrainConfig,
  init_state,
  read_config,
)
from mcjax.training.gist.trainer import train_step
from mcjax.training.lens import trainer as lens_trainer
from mcjax.types import McjaxError

# A CPU widens bfloat16 weights for its products; ahead of the loop over layers
# it would do so for all layers at once, which no accelerator does.
_HOISTS = ("while-loop-invariant-code-motion,"
           "while-loop-expensive-invariant-code-motion")


@dataclasses.dataclass(frozen=True)
class Row:
  """A part of what a device holds: bytes there, and of the whole of it."""

  name: str
  device: int
  whole: int


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
  """A mesh of devices that need not exist.

  Raises:
    McjaxError: a size is not positive.
  """
  if min(data, fsdp, tensor) < 1:
    raise McjaxError(f"mesh sizes must be positive, got data={data} "
                     f"fsdp={fsdp} tensor={tensor}")
  return AbstractMesh((data, fsdp, tensor), AXES, (AxisType.Auto,) * 3)


def _row(name: str, tree, shardings) -> Row:
  """Sums shapes [bytes] over a pytree; on a device by their shardings."""
  device = whole = 0
  for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings),
                            strict=True):
    size = np.dtype(leaf.dtype).itemsize
    device += size * math.prod(sharding.shard_shape(leaf.shape))
    whole += size * math.prod(leaf.shape)
  return Row(name, device, whole)


def abstract_base(config: DecoderConfig, dtype: str) -> dict:
  """Shapes and dtypes of a base's parameters."""
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
    param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def _lens_state(lens: lensnet.LensNetConfig):
  params = lensnet.init_params(lens)
  rule = lens_trainer.optimizer(lens_trainer.LensTrainConfig())
  return {"params": params, "optimizer": rule.init(params)}


def plan(base: DecoderConfig, mesh: AbstractMesh, train: TrainConfig,
         gist: Mapping[str, Any], dtype: str = "bfloat16", window: int = 2048,
         rules: Rules = RULES) -> list[Row]:
  """What training and the loop hold, part by part.

  Args:
    base: sizes of the base.
    mesh: see `abstract_mesh`.
    train: the GistNet run.
    gist: plain values of its network, as in a configuration file.
    dtype: of the base.
    window: slots W of the working context.
    rules: how all is split.

  Raises:
    McjaxError: something does not divide among the devices.
  """
  shapes = abstract_base(base, dtype)
  config = gist_weights.configure(None, base, {
    **gist, "input_rms": gist.get("input_rms") or 1.0})
  state = jax.eval_shape(
    lambda: init_state(train, gist_weights.init_params(config)))
  lens = jax.eval_shape(
    lambda: _lens_state(lensnet.LensNetConfig(d_model=base.d_model)))
  lead = int(config.per_level)

  def split(part: str, tree):
    return rules.shardings(part, tree, mesh, lead if part == "gistnet" else 0)

  cache = jax.ShapeDtypeStruct(
    (base.n_layers, base.n_kv_heads, window, base.head_dim), jnp.dtype(dtype))
  ids = jax.ShapeDtypeStruct(
    (train.batch // train.micro_batch, train.micro_batch,
     max(o.window for p in train.phases for o in p.turns)), jnp.int32)
  if train.micro_batch % rules.batch_devices(mesh):
    raise McjaxError(f"micro_batch={train.micro_batch} does not divide among "
                     f"data × fsdp = {rules.batch_devices(mesh)} devices")
  rows = [_row(f"base, {dtype}", shapes, split("base", shapes))]
  rows += [
    _row(f"GistNet, {name}", state[key], split("gistnet", state[key]))
    for name, key in (("parameters", "params"), ("gradients", "params"),
                      ("optimizer", "optimizer"))]
  rows += [
    _row(f"LensNet, {name}", lens[key], split("lensnet", lens[key]))
    for name, key in (("parameters", "params"), ("optimizer", "optimizer"))]
  kv = rules.kv_sharding(cache.shape, mesh)
  rows.append(_row(f"KV slots, window {window}", [cache] * 2, [kv] * 2))
  rows.append(_row(f"token ids of a batch of {train.batch}", [ids],
                   [rules.batch_sharding(mesh, axis=1)]))
  return rows


def table(rows: list[Row]) -> str:
  """Rows and their sum, in GiB."""
  rows = [*rows, Row("sum, activations besides", sum(r.device for r in rows),
                     sum(r.whole for r in rows))]
  lines = [f"{'':<32}{'GiB a device':>14}{'GiB in all':>12}"]
  return "\n".join(lines + [
    f"{r.name:<32}{r.device / 2**30:>14.3f}{r.whole / 2**30:>12.3f}"
    for r in rows])


def compiled_bytes(base: DecoderConfig, mesh, train: TrainConfig,
                   gist: Mapping[str, Any], dtype: str = "bfloat16",
                   rules: Rules = RULES) -> int:
  """Bytes of a device that the compiler sets aside for the first step.

  These are activations and intermediate results, beside what `plan` lists; a
  compiler for another platform may need more or less.

  Args:
    mesh: of devices that exist; the other arguments are as of `plan`.
  """
  config = gist_weights.configure(None, base, {
    **gist, "input_rms": gist.get("input_rms") or 1.0})
  state = jax.eval_shape(
    lambda: init_state(train, gist_weights.init_params(config)))
  o = train.objective(0)
  ids = jax.ShapeDtypeStruct(
    (train.batch // train.micro_batch, train.micro_batch, o.window), jnp.int32)
  shapes = abstract_base(base, dtype)
  splits = (
    rules.shardings("gistnet", state, mesh, int(config.per_level)),
    rules.shardings("base", shapes, mesh), rules.batch_sharding(mesh, axis=1))
  arguments = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    (state, shapes, ids), splits)
  step = jax.jit(functools.partial(
    train_step, config=train, gist_config=config, base_config=base,
    objective=o), donate_argnums=0, out_shardings=(splits[0], None))
  compiled = step.lower(*arguments).compile({"xla_disable_hlo_passes": _HOISTS})
  found = compiled.memory_analysis()
  if found is None:
    raise McjaxError(f"the compiler for {jax.default_backend()} does not tell "
                     "what it needs")
  return found.temp_size_in_bytes


def report(c, source: str, sizes: Sequence[str], window: int,
           compiled: bool = False) -> str:
  """The plan of a GistNet run's configuration, as text.

  Args:
    c: the ConfigDict.
    source: of the base; the configuration's if empty.
    sizes: data, fsdp, tensor.
    window: slots W of the working context.
    compiled: with `compiled_bytes`.
  """
  try:
    data, fsdp, tensor = map(int, sizes)
  except ValueError as error:
    raise McjaxError("--mesh must be three numbers data,fsdp,tensor, got "
                     + ",".join(sizes)) from error
  base = load_decoder_config(source or c.base)
  train = read_config(c.train, c.objective, c.phases)
  text = table(plan(base, abstract_mesh(data, fsdp, tensor), train, c.gistnet,
                    c.dtype, window))
  if compiled:
    mesh = make_mesh(data, fsdp, tensor)
    size = compiled_bytes(base, mesh, train, c.gistnet, c.dtype)
    text += (f"\nactivations and intermediate results: {size / 2**30:.3f} GiB "
             f"a device, compiled for {jax.default_backend()}")
  return text
