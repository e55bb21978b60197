"""Teaches LensNet's keys.

  python -m experiments.train_keys --workdir=… --export=…

The teacher's vectors (`mcjax.evaluation.systems.rag`) stay in the workdir, so
the same command resumes. All else of the LensNet stays; see `tools/rekey`.
"""

import dataclasses

from absl import flags
import numpy as np

from mcjax import pretrained
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.evaluation.systems import rag
from mcjax.lens import keyer as lens_keyer
from mcjax.training.common import data
from mcjax.training.lens import key_distil
from mcjax.types import McjaxError

_CONFIG = commands.ConfigFlag(__file__, "keys")
_WORKDIR = commands.define_workdir("The teacher's vectors.")
_EXPORT = flags.DEFINE_string(
  "export", None, "Write the LensNet there.", required=True)


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  config = key_distil.read_config(c.distil)
  lm = load_base_lm(c.base)
  source = c.lensnet or pretrained.shipped(lm.name, "lensnet")
  if source is None:
    raise McjaxError(f"no LensNet is shipped for {lm.name}: name one by "
                     "--config.lensnet")
  params, fields, card = pretrained.read_weights(source, "lensnet")
  stores = data.open_split(c.data, "train")
  texts = key_distil.read(
    stores, lm.tokenizer, len(lm.params["embed"]), rag.Embedder(batch=64),
    config, _WORKDIR.value)
  texts, held = key_distil.split(texts, c.held_blocks, c.held_questions)
  table, facts = key_distil.teach(
    texts, held, config, np.asarray(lm.params["embed"], np.float32))
  for name, values in facts.items():
    print(f"{name}, other questions among {c.held_blocks} other blocks: "
          + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
  pretrained.save_weights(
    _EXPORT.value, "lensnet", {**params, lens_keyer.TABLE: table}, fields,
    card | {"keys": {"distil": dataclasses.asdict(config),
                     "teacher": rag.MODEL, **facts}})


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
