"""Teaches LensNet's keys.

  python -m experiments.train_keys --workdir=… --export=…

The teacher's vectors (`mcjax.evaluation.systems.rag`) stay in the workdir, so
the same command resumes. All else of the LensNet stays; see `tools/rekey`.
With --config.carry_from=BASE nothing is taught: the keys of that base's
LensNet are carried over to another vocabulary, and its scores as far as they
need no gists; the teacher only judges.
"""

import dataclasses

from absl import flags
import numpy as np

from mcjax import pretrained
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.evaluation.systems import rag
from mcjax.lens import keyer as lens_keyer
from mcjax.lens import network as lensnet
from mcjax.training.common import data
from mcjax.training.lens import key_distil, key_transfer

_CONFIG = commands.ConfigFlag(__file__, "keys")
_WORKDIR = commands.define_workdir("The teacher's vectors.")
_EXPORT = flags.DEFINE_string(
  "export", None, "Write the LensNet there.", required=True)


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  config = key_distil.read_config(c.distil)
  lm = load_base_lm(c.base, dtype=c.dtype)
  params, fields, card = _started(c, lm)
  texts = key_distil.read(
    data.open_split(c.data, "train"), lm.tokenizer, len(lm.params["embed"]),
    rag.Embedder(batch=64), config, _WORKDIR.value,
    token_vectors=not c.carry_from)
  texts, held = key_distil.split(texts, c.held_blocks, c.held_questions)
  if c.carry_from:
    table, facts = key_transfer.carried_from(c.carry_from, lm, held)
  else:
    table, facts = key_distil.teach(
      texts, held, config, np.asarray(lm.params["embed"], np.float32))
  for name, values in facts.items():
    print(f"{name}, other questions among {c.held_blocks} other blocks: "
          + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
  pretrained.save_weights(
    _EXPORT.value, "lensnet", {**params, lens_keyer.TABLE: table}, fields,
    card | {"keys": {"distil": dataclasses.asdict(config),
                     "carried_from": c.carry_from, "teacher": rag.MODEL,
                     **facts}})


def _started(c, lm) -> tuple[dict, dict, dict]:
  """The LensNet that gets the keys: one that is there, or a fresh one.

  A fresh one reads no gists, so that it serves every base of the tokenizer.
  """
  source = c.lensnet or pretrained.shipped(lm.name, "lensnet")
  if source is not None:
    return pretrained.read_weights(source, "lensnet")
  lens = lensnet.LensNetConfig(
    d_model=lm.config.d_model, gists=False, key_dim=c.distil.key_dim)
  params = lensnet.init_params(lens)
  if c.carry_from:
    params = key_transfer.carried_scores(
      key_transfer.shipped_params(c.carry_from), params)
  return params, dataclasses.asdict(lens), {}


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
