"""Ablations of GistNet: one change each against `baseline`.

Command:
  python -m experiments.ablate_gistnet --workdir=runs/ablation
One of them alone, trained and evaluated as any GistNet:
  python -m experiments.train_gistnet --workdir=runs/slots_2 \
    --config=experiments/configs/gistnet_ablation.py:slots_2

From a fresh network, 80 steps of 1,024 tokens unless told otherwise: about five
minutes on 2 idle CPU cores. Short runs tell which change learns faster, not
which ends better. docs/trials.md has what they reached. `shared_levels` and
`own_levels` train level 2 as well and compare with each other. Those whose
names begin with `more` train the weights shipped for SmolLM2-135M on.
"""

from experiments.configs import gistnet
from mcjax.types import McjaxError

_SHIPPED = "mcjax/pretrained/smollm2-135m/gistnet.safetensors"
_UPPER = dict(level=2, window=1088, segment=64, kl_segments=1, nll=0.2)
_ON = dict(learning_rate=1e-3)

# name: what differs from the default, by part of the configuration
ABLATIONS = {
  "baseline": {},
  # places and scale
  "stride_8": dict(objective=dict(gist_stride=8)),
  "stride_32": dict(objective=dict(gist_stride=32)),
  "scale_clamped": dict(gistnet=dict(clamp_norm=True)),
  # what the network reads and writes
  "features_1": dict(gistnet=dict(input_layer=1)),
  "features_4": dict(gistnet=dict(input_layer=4)),
  "slots_2": dict(gistnet=dict(slots_per_gist=2)),
  "slots_4": dict(gistnet=dict(slots_per_gist=4)),
  "context_8": dict(gistnet=dict(context_blocks=8)),
  "no_copies": dict(gistnet=dict(copy_heads=0)),
  # how the base reads what it writes
  "no_adapter": dict(gistnet=dict(adapter_layers=0)),
  # two and three rounds, and less feed-forward, at the cost of the baseline
  "deep_2": dict(gistnet=dict(
    rounds=2, width=180, mlp_width=162, slot_mlp_width=360)),
  "deep_3": dict(gistnet=dict(
    rounds=3, width=168, mlp_width=134, slot_mlp_width=336)),
  "wide": dict(gistnet=dict(width=210, mlp_width=100, slot_mlp_width=210)),
  # more of everything, at up to five times the cost
  "rounds_3": dict(gistnet=dict(rounds=3)),
  "children_2": dict(gistnet=dict(children_layers=2)),
  "large": dict(gistnet=dict(
    children_layers=2, rounds=2, width=320, heads=10, mlp_width=640,
    slot_parts=2, slot_mlp_width=640)),
  "large_3": dict(gistnet=dict(
    children_layers=2, rounds=3, width=384, heads=12, mlp_width=768,
    slot_mlp_width=768)),
  "reader": dict(gistnet=dict(adapter_rank=32, lora_rank=16)),
  "key_value": dict(gistnet=dict(key_value=True),
                    turns=[dict(key_value=True)], replaces=True,
                    train=dict(adapter_rate=3e-3)),
  # from trained weights
  "more": dict(initial=_SHIPPED, train=_ON),
  "more_context_8": dict(
    initial=_SHIPPED, train=_ON, gistnet=dict(context_blocks=8)),
  "more_reader": dict(
    initial=_SHIPPED, train=_ON, gistnet=dict(lora_rank=16)),
  "shared_levels": dict(turns=[_UPPER]),
  "own_levels": dict(gistnet=dict(per_level=True), turns=[_UPPER]),
  # the objective
  "attend": dict(objective=dict(attend=100.0)),
  "attend_only": dict(objective=dict(attend=100.0, kl=0.0)),
  "nll_only": dict(objective=dict(kl=0.0, nll=1.0)),
  "kl_and_nll": dict(objective=dict(nll=0.5)),
  "no_contrast": dict(objective=dict(contrast=0.0)),
  "rebuild": dict(objective=dict(rebuild=0.1)),
  "sink": dict(objective=dict(sink=True)),
  "early": dict(objective=dict(early=2.0)),
  # the optimizer
  "adamw": dict(train=dict(optimizer="adamw", learning_rate=1e-3)),
  "rate_half": dict(train=dict(learning_rate=1e-3)),
  "rate_double": dict(train=dict(learning_rate=4e-3)),
}


def get_config(name="baseline", steps=80, batch=2):
  """The settings of one of `ABLATIONS`; a step has `batch` windows of 512."""
  if name not in ABLATIONS:
    raise McjaxError(f"no ablation {name!r}; there are {', '.join(ABLATIONS)}")
  change = ABLATIONS[name]
  c = gistnet.get_config(str(steps))
  c.gistnet.update(change.get("gistnet", {}))
  c.objective.update(change.get("objective", {}))
  c.train.update(dict(batch=batch, log_every=1, validation_documents=20))
  c.train.update(change.get("train", {}))
  c.initial = change.get("initial", "")
  first = [] if change.get("replaces") else [{}]
  c.phases = [dict(steps=steps, turns=[*first, *change.get("turns", [])])]
  return c
