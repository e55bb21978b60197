"""Trains a GistNet: python -m experiments.train_gistnet --config=… --workdir=…

Resumes from the newest checkpoint of the workdir; SIGTERM or Ctrl-C leaves a
checkpoint and exits.
"""

import pathlib
import sys

from absl import app, flags
import jax
from ml_collections import config_flags

from mcjax import gistnet
from mcjax.base.load import load_base_lm
from mcjax.training import data, gist_trainer
from mcjax.training.losses import Objective
from mcjax.types import McjaxError

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment")
_WORKDIR = flags.DEFINE_string("workdir", None, "checkpoints and metrics")
_EXPORT = flags.DEFINE_string("export", None, "write the final weights there")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of many processes")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  del argv
  c = _CONFIG.value
  try:
    if _DISTRIBUTED.value:
      jax.distributed.initialize()
    lm = load_base_lm(c.base, dtype=c.dtype)
    initial = None
    gist_config = gistnet.default_config(lm.params, lm.config, **c.gistnet)
    if c.initial:
      initial, gist_config, _ = gistnet.read_gistnet(c.initial)
    phases = tuple(gist_trainer.Phase(p["steps"], *_objectives(c, p))
                   for p in c.phases)
    folder = pathlib.Path(c.data or data.default_folder())
    trainer = gist_trainer.GistTrainer(
      lm, gist_config, gist_trainer.TrainConfig(phases=phases, **c.train),
      data.open_split(folder, "train", c.mixture or None), _WORKDIR.value,
      dict(c.mixture) or None, initial)
    done = trainer.run(data.open_split(folder, "validation"))
    if done and _EXPORT.value:
      trainer.export(_EXPORT.value, {"config": c.to_dict()})
  except McjaxError as error:
    sys.exit(f"train_gistnet: {error}")


if __name__ == "__main__":
  app.run(main)
