"""Which stored form of the weights XLA multiplies fastest for one token, here.

  python tools/measure_decode_forms.py [--width=1536] [--hidden=8960]

Decoding reads every weight once a token, so it is bound by memory, and bfloat16
or int8 would read half or a quarter. Each form multiplies one vector by the
same matrices; rounds take turns, and the least of each counts. A form is worth
storing where its last column is well above 1.
"""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any, NamedTuple

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

_WIDTH = flags.DEFINE_integer("width", 1536, "Inputs of a matrix.")
_HIDDEN = flags.DEFINE_integer("hidden", 8960, "Outputs of a matrix.")
_COUNT = flags.DEFINE_integer("count", 6, "Matrices; more than a cache holds.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Repeats.")
_BLOCK = 64  # rows that are widened at once, to stay in a core's cache


class Form(NamedTuple):
  """A stored form: how it is made of [out, in], and multiplied by [1, in]."""

  make: Callable[[np.ndarray], Any]
  times: Callable[[jax.Array, Any], jax.Array]


def _quantised(w: np.ndarray):
  scale = np.abs(w).max(axis=1) / 127
  return jnp.asarray(np.rint(w / scale[:, None]).astype(np.int8)), (
    jnp.asarray(scale[None]))


def _in_blocks(x, w):
  """Widened a few rows at a time, then multiplied in float32."""
  def one(_, rows):
    wide = jax.lax.optimization_barrier(rows.astype(jnp.float32))
    return None, jnp.einsum("td,bd->tb", x, wide)
  parts = jax.lax.scan(one, None, w.reshape(-1, _BLOCK, w.shape[1]))[1]
  return parts.reshape(1, -1)


def _whole_numbers(x, w):
  """int8 activations too, summed in int32."""
  scale = jnp.max(jnp.abs(x)) / 127
  total = jnp.einsum("td,fd->tf", jnp.rint(x / scale).astype(jnp.int8), w[0],
                     preferred_element_type=jnp.int32)
  return total.astype(jnp.float32) * (w[1] * scale)


FORMS = {
  "float32 [in, out], as stored": Form(
    lambda w: jnp.asarray(np.ascontiguousarray(w.T)),
    lambda x, w: jnp.einsum("td,df->tf", x, w)),
  "float32 [out, in]": Form(
    jnp.asarray, lambda x, w: jnp.einsum("td,fd->tf", x, w)),
  "bfloat16, product of bfloat16": Form(
    lambda w: jnp.asarray(w.T, jnp.bfloat16),
    lambda x, w: jnp.einsum("td,df->tf", x.astype(w.dtype), w,
                            preferred_element_type=jnp.float32)),
  "bfloat16, fused widening and sum": Form(
    lambda w: jnp.asarray(w, jnp.bfloat16),
    lambda x, w: jnp.sum(x * w.astype(jnp.float32), axis=1)[None]),
  "int8, widened in blocks": Form(
    _quantised, lambda x, w: _in_blocks(x, w[0]) * w[1]),
  "int8, fused widening and sum": Form(
    _quantised,
    lambda x, w: jnp.sum(x * w[0].astype(jnp.float32), axis=1)[None] * w[1]),
  "int8, whole numbers": Form(_quantised, _whole_numbers),
}


def _chain(times):
  """One product after another, each needing the last."""
  def run(x, stored):
    for w in stored:
      x = x + jnp.sum(times(x, w)) * 1e-6
    return x
  return jax.jit(run)


def main(argv) -> None:
  del argv
  draw = np.random.default_rng(0)
  shape = _HIDDEN.value // _BLOCK * _BLOCK, _WIDTH.value
  weights = [draw.standard_normal(shape, np.float32) * 0.02
             for _ in range(_COUNT.value)]
  x = jnp.asarray(draw.standard_normal((1, shape[1]), np.float32))
  runs = {name: (_chain(form.times), [form.make(w) for w in weights])
          for name, form in FORMS.items()}
  least = {name: np.full(2, np.inf) for name in runs}
  for turn in range(_ROUNDS.value + 1):
    for name, (run, stored) in runs.items():
      begin = time.perf_counter(), time.process_time()
      run(x, stored).block_until_ready()
      took = (time.perf_counter() - begin[0], time.process_time() - begin[1])
      if turn:  # the first compiles
        least[name] = np.minimum(least[name], took)
  total = _COUNT.value * shape[0] * shape[1] / 1e9
  first = least[next(iter(FORMS))]
  for name, (wall, busy) in least.items():
    print(f"{name:34} {total / wall:5.2f} billion weights/s, "
          f"{total / busy:5.2f} a CPU second; {first[1] / busy:.2f} times the "
          "first")


if __name__ == "__main__":
  app.run(main)
