"""Trains a GistNet: python -m experiments.train_gistnet --config=… --workdir=…

Resumes from the newest checkpoint of the workdir; SIGTERM or Ctrl-C leaves a
checkpoint and exits.
"""

import pathlib

from absl import flags, logging
import jax

from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.gist import encoder as gistnet
from mcjax.training.common import data
from mcjax.training.gist import trainer as gist_trainer

_CONFIG = commands.define_config(
  str(pathlib.Path(__file__).parent / "configs/gistnet.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and metrics.")
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights there.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of many processes.")
flags.mark_flag_as_required("workdir")


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  logging.set_verbosity(logging.WARNING)
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  use_compilation_cache(pathlib.Path(_WORKDIR.value) / "compiled")
  train = gist_trainer.read_config(c.train, c.objective, c.phases)
  lm = load_base_lm(c.base, dtype=c.dtype)
  initial, gist_config, lineage = gistnet.start(
    lm, c.gistnet, c.initial, train.seed)
  folder = pathlib.Path(c.data or data.default_folder())
  mixture = dict(c.mixture) or None
  trainer = gist_trainer.GistTrainer(
    lm, gist_config, train, data.open_split(folder, "train", mixture),
    _WORKDIR.value, mixture, initial)
  done = trainer.run(data.open_split(folder, "validation")
                     if train.validation_documents else None)
  if done and _EXPORT.value:
    trainer.export(_EXPORT.value, {"config": c.to_dict(), **lineage})


if __name__ == "__main__":
  commands.run(main, _CONFIG)
