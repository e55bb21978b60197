"""Teaches LensNet's keys: python -m experiments.train_keys --workdir=… …

The teacher's vectors (`mcjax.evaluation.systems.rag`) stay in the workdir, so
the same command resumes, and processes (--distributed) share them. All else of
the LensNet stays; see `tools/rekey`.
--config.carry_from=BASE carries that base's keys over; the teacher only judges.
"""

import dataclasses

from absl import flags
import numpy as np

from mcjax import pretrained
from mcjax.base.load import load_base_lm
from mcjax.cli import commands, training
from mcjax.evaluation.systems import rag
from mcjax.lens import keyer as lens_keyer
from mcjax.parallel import processes
from mcjax.training.common import data
from mcjax.training.lens import key_distil, key_transfer

_CONFIG = commands.ConfigFlag(__file__, "keys")
_WORKDIR = commands.define_workdir("The teacher's vectors.")
_EXPORT = flags.DEFINE_string("export", None, "The LensNet.", required=True)


def main(argv) -> bool:
  del argv
  c = _CONFIG.value
  training.keep_programs(_WORKDIR.value)
  config = key_distil.read_config(c.distil)
  lm = load_base_lm(c.base, dtype=c.dtype)
  params, fields, card = key_transfer.started(
    lm, c.lensnet, c.distil.key_dim, c.carry_from)
  stores = data.open_split(c.data, "train", lm=lm)
  texts = key_distil.read(
    stores, lm.tokenizer, len(lm.params["embed"]), rag.Embedder(batch=64),
    config, _WORKDIR.value, token_vectors=not c.carry_from)
  texts, held = key_distil.split(texts, c.held_blocks, c.held_questions)
  table, facts = (
    key_transfer.carried_from(c.carry_from, lm, held) if c.carry_from else
    key_distil.teach(
      texts, held, config, np.asarray(lm.params["embed"], np.float32)))
  if processes.is_first():
    print(key_distil.told(facts, c.held_blocks))
    card["keys"] = {"distil": dataclasses.asdict(config), **facts,
                    "carried_from": c.carry_from, "teacher": rag.MODEL}
    pretrained.save_weights(_EXPORT.value, "lensnet", {
      **params, lens_keyer.TABLE: table}, fields, card)
  processes.barrier("exported")
  return True


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
