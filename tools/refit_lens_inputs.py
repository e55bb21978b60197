"""Fits a LensNet to another GistNet; see tools/refit_lensnet.

First its input projections, then all its scores, to what it made of the old
gists. Needs no labels; training it anew on the new gists may be better.
"""

import pathlib

from absl import flags
import numpy as np
import tqdm

from mcjax import pretrained
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.gist import encoder as gistnet
from mcjax.lens import network as lensnet
from mcjax.training.common import data
from mcjax.training.lens import distil as lens_distil
from mcjax.training.lens import refit as lens_refit
from mcjax.training.lens import tasks as focus_tasks

_BASE = flags.DEFINE_string("base", "smollm2-135m", "base model")
_LENSNET = flags.DEFINE_string("lensnet", None, "weights to fit")
_OLD = flags.DEFINE_string("old", None, "the GistNet they were trained with")
_NEW = flags.DEFINE_string("new", None, "the GistNet to fit them to")
_OUT = flags.DEFINE_string("out", None, "where the result goes")
_DATA = flags.DEFINE_string(
  "data", None, "token store; the user cache if unset")
_WINDOWS = flags.DEFINE_integer("windows", 1000, "of 1,024 tokens", 1)
_TASKS = flags.DEFINE_integer("tasks", 250, "whose scores are learned", 0)
_STEPS = flags.DEFINE_integer("steps", 600, "of 16 windows", 1)
for name in ("lensnet", "old", "new", "out"):
  flags.mark_flag_as_required(name)


def main(argv):
  del argv
  lm = load_base_lm(_BASE.value)
  old, new = (gistnet.load_gistnet(lm, path) for path in (
    _OLD.value, _NEW.value))
  params, fields, card = pretrained.read_weights(_LENSNET.value, "lensnet")
  stores = data.open_split(
    pathlib.Path(_DATA.value or data.default_folder()), "train")
  sampler = data.WindowSampler(stores, 1024, None, 0)
  ids = sampler.batch(0, _WINDOWS.value).astype(np.int32)
  score, missed = lens_refit.refit(
    params["score"], old, new, np.asarray(lm.params["embed"]), ids)
  for name, share in missed.items():
    print(f"{name}: {share:.1%} of the variance missed on other blocks")
  fitted = params | {"score": score}
  if _TASKS.value:
    tasks = focus_tasks.TaskSource(stores, lm.tokenizer)
    seen = lens_distil.observe(lm, old, new, tasks, _TASKS.value)
    windows = [w for w in tqdm.tqdm(seen, unit="window")]
    fitted, shares = lens_distil.distil(
      params, fitted, lensnet.LensNetConfig(**fields), lm.params["embed"],
      windows, _STEPS.value)
    print(f"scores: {shares['before']:.1%} of the variance missed on other "
          f"windows before, {shares['after']:.1%} after")
  pretrained.save_weights(
    _OUT.value, "lensnet", fitted, fields,
    card | {"refitted_to_gistnet": new.fingerprint})


if __name__ == "__main__":
  commands.run(main)
