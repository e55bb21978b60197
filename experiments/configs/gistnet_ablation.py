"""Ablations of GistNet: one change each against `baseline`.

Command, for instance:
  python -m experiments.train_gistnet --workdir=runs/ablation/slots_2 \
    --config=experiments/configs/gistnet_ablation.py:slots_2
  python -m experiments.evaluate --suite=substitution \
    --set=weights=runs/ablation/slots_2/best.safetensors

300 steps of 2,048 tokens: 25 to 40 minutes on 2 idle CPU cores; features_4
takes a tenth more. Expected result: recovered on validation text, printed
every 100 steps; the baseline's is about 0.28 at step 100 before the rate falls.
`shared_levels` and `own_levels` train level 2 as well and compare with each
other.
"""

from experiments.configs import gistnet
from mcjax.types import McjaxError

_UPPER = dict(level=2, window=1088, segment=64, kl_segments=1, nll=0.2)

# name: (fields of GistNetConfig, fields of Objective, further turns)
ABLATIONS = {
  "baseline": ({}, {}, []),
  "stride_8": ({}, dict(gist_stride=8), []),
  "stride_32": ({}, dict(gist_stride=32), []),
  "scale_clamped": (dict(clamp_norm=True), {}, []),
  "features_1": (dict(input_layer=1), {}, []),
  "features_4": (dict(input_layer=4), {}, []),
  "slots_2": (dict(slots_per_gist=2), {}, []),
  "slots_4": (dict(slots_per_gist=4), {}, []),
  "no_copies": (dict(copy_heads=0), {}, []),
  # two and three rounds, and less feed-forward, at the cost of the baseline
  "deep_2": (dict(rounds=2, width=180, mlp_width=162, slot_mlp_width=360), {},
             []),
  "deep_3": (dict(rounds=3, width=168, mlp_width=134, slot_mlp_width=336), {},
             []),
  "wide": (dict(width=210, mlp_width=100, slot_mlp_width=210), {}, []),
  "shared_levels": ({}, {}, [_UPPER]),
  "own_levels": (dict(per_level=True), {}, [_UPPER]),
  "kl_only": ({}, dict(attend=0.0), []),
  "attend_only": ({}, dict(kl=0.0), []),
  "nll_only": ({}, dict(kl=0.0, attend=0.0, nll=1.0), []),
  "no_contrast": ({}, dict(contrast=0.0), []),
  "rebuild": ({}, dict(rebuild=0.1), []),
  "sink": ({}, dict(sink=True), []),
  "early": ({}, dict(early=2.0), []),
}


def get_config(name="baseline"):
  """The settings of one of `ABLATIONS`."""
  if name not in ABLATIONS:
    raise McjaxError(f"no ablation {name!r}; there are {', '.join(ABLATIONS)}")
  network, objective, turns = ABLATIONS[name]
  c = gistnet.get_config("300")
  c.gistnet = network
  c.objective.update(objective)
  c.phases = [dict(steps=300, turns=[{}, *turns])]
  return c
