"""What a step costs, and how much of the devices it uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

# bfloat16 FLOP/s of one device, as its maker states them.
_PEAKS: Mapping[str, float] = {
  "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
  "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
  "NVIDIA A100": 312e12, "NVIDIA L4": 121e12, "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12}


def peak_flops(tflops: float = 0.0) -> float | None:
  """FLOP/s of all devices of the run; None where they are not known.

  Args:
    tflops: of one device, in 10^12; 0 goes by its kind.
  """
  kind = jax.devices()[0].device_kind
  known = [name for name in _PEAKS if kind.startswith(name)]
  if not tflops and not known:
    return None
  one = tflops * 1e12 or _PEAKS[max(known, key=len)]
  return one * jax.device_count()


def rates(tokens: int, flops: float, seconds: float, tflops: float = 0.0
          ) -> dict[str, float]:
  """Tokens a second and, where the devices' peak is known, MFU.

  Args:
    tokens: of a step.
    flops: that its model asks for; what is computed twice counts once.
    seconds: that it took.
    tflops: as of `peak_flops`.
  """
  found = {"tokens_per_second": tokens / seconds}
  peak = peak_flops(tflops)
  if peak is not None:
    found["mfu"] = flops / seconds / peak
  return found


def memory_line(compiled: Any) -> str:
  """What a compiled step takes on every device, by its compiler."""
  found = compiled.memory_analysis()
  if found is None:
    return f"the compiler for {jax.default_backend()} does not tell its memory"
  held = found.argument_size_in_bytes
  made = found.output_size_in_bytes - found.alias_size_in_bytes
  temp = found.temp_size_in_bytes
  return (f"a step takes {(held + made + temp) / 2**30:.2f} GiB a device: "
          f"{held / 2**30:.2f} parameters, state and batch, "
          f"{temp / 2**30:.2f} intermediate results")
