"""Teaches LensNet's keys.

  python -m experiments.train_keys --workdir=… --export=…

The teacher is the sentence embedding of `evaluation/rag.py`; its vectors are
kept in the workdir, so the same command resumes. The result is a LensNet with
all else as it was; `tools/rekey` writes its keys into a tree.
"""

import dataclasses
import pathlib

from absl import flags, logging
import numpy as np

from mcjax import pretrained
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.evaluation.systems import rag
from mcjax.lens import keyer as lens_keyer
from mcjax.training.common import data
from mcjax.training.lens import key_distil
from mcjax.types import McjaxError

_CONFIG = commands.define_config(
  str(pathlib.Path(__file__).parent / "configs/keys.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "The teacher's vectors.")
_EXPORT = flags.DEFINE_string("export", None, "Write the LensNet there.")
flags.mark_flags_as_required(["workdir", "export"])


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  logging.set_verbosity(logging.WARNING)
  config = key_distil.read_config(c.distil)
  lm = load_base_lm(c.base)
  source = c.lensnet or pretrained.shipped(lm.name, "lensnet")
  if source is None:
    raise McjaxError(f"no LensNet is shipped for {lm.name}: name one by "
                     "--config.lensnet")
  params, fields, card = pretrained.read_weights(source, "lensnet")
  stores = data.open_split(c.data or data.default_folder(), "train")
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


if __name__ == "__main__":
  commands.run(main, _CONFIG)
