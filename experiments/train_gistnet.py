"""Trains a GistNet: python -m experiments.train_gistnet --config=… --workdir=…

Resumes from the newest checkpoint of the workdir; SIGTERM or Ctrl-C leaves a
checkpoint and exits with status 75. With --distributed one of many processes.
"""

from absl import flags

from mcjax.base.load import load_base_lm
from mcjax.cli import commands, training
from mcjax.gist import weights as gist_weights
from mcjax.training.common import data
from mcjax.training.gist import key_value_loss
from mcjax.training.gist import trainer as gist_trainer

_CONFIG = commands.ConfigFlag(__file__, "gistnet")
_WORKDIR = commands.define_workdir("Checkpoints and metrics.")
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights there.")
_PEFT = flags.DEFINE_string(
  "peft", None, "Write the final LoRA there, a folder in PEFT's layout.")


def main(argv) -> bool:
  del argv
  c = _CONFIG.value
  training.keep_programs(_WORKDIR.value)
  train = gist_trainer.read_config(c.train, c.objective, c.phases)
  mesh = gist_trainer.make_mesh(train)
  lm = load_base_lm(c.base, dtype=c.dtype, mesh=mesh if mesh.size > 1 else None)
  initial, gist_config, lineage = gist_weights.start(
    lm, c.gistnet, c.initial, train.seed)
  stores, mixture = data.open_mixture(c.data, c.mixture, c.kinds, lm)
  if gist_config.key_value:
    initial = key_value_loss.started(
      lm, gist_config, initial, stores, train.seed)
  trainer = gist_trainer.GistTrainer(
    lm, gist_config, train, stores, _WORKDIR.value, mixture, initial)
  done = trainer.run(data.open_split(c.data, "validation")
                     if train.validation_documents else None)
  if done and _EXPORT.value:
    trainer.export(_EXPORT.value, {"config": c.to_dict(), **lineage})
  if done and _PEFT.value:
    trainer.export_lora(_PEFT.value)
  return done


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
