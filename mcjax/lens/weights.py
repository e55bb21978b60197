"""LensNet's weights on disk: written, read, and what of older ones is kept."""

from __future__ import annotations

import dataclasses

import numpy as np

from mcjax import pretrained
from mcjax.base.load import BaseLM
from mcjax.lens import features as lens_features
from mcjax.lens import network as lensnet
from mcjax.lens import sentence_net
from mcjax.lens.keyer import TABLE
from mcjax.types import McjaxError

_GROWN = (64,)  # features of earlier weights that read the first of today's


def save_lensnet(path, params, config: lensnet.LensNetConfig, card: dict
                 ) -> None:
  """Writes weights, configuration and the facts of `card` as safetensors."""
  pretrained.save_weights(
    path, "lensnet", params, dataclasses.asdict(config), card)


def read_weights(lm: BaseLM, source=None, reads: bool = True
                 ) -> tuple[dict, lensnet.LensNetConfig, dict | None]:
  """Parameters, sizes and card; fresh ones where none fit the base.

  Weights of an older LensNet keep their keys, which stand in trees, and get
  fresh scores.

  Args:
    lm: the base.
    source: a file; None takes the shipped weights of a base of this name.
    reads: whether the choice of sentences is wanted too; where it is fitted
      anew, it may be one of other features.

  Raises:
    McjaxError: the file is missing, unreadable or made for another width.
  """
  config = lensnet.LensNetConfig(d_model=lm.config.d_model)
  path = source or pretrained.shipped(lm.name, "lensnet")
  if path is None:
    return lensnet.init_params(config), config, None
  params, fields, card = pretrained.read_weights(path, "lensnet")
  if reads:
    sentence_net.check(path, params)
  else:
    params.pop(sentence_net.PART, None)
  if not fields.get("gists", True):  # it serves every base of the tokenizer
    fields["d_model"] = lm.config.d_model
    _check_table(path, params, lm)
  if fields.get("d_model") != lm.config.d_model:
    if source is not None:
      raise McjaxError(f"{source}: this LensNet reads vectors of "
                       f"{fields.get('d_model')}, but {lm.name} embeds in "
                       f"{lm.config.d_model}")
    return lensnet.init_params(config), config, None
  fields["features"] = _grow(params, fields.get("features"))
  if fields["features"] == lens_features.FEATURES:
    config = pretrained.laid_out(
      path, params, lensnet.init_params, lensnet.LensNetConfig, fields,
      exact=False)
    return params, config, card
  if source is not None:
    raise McjaxError(
      f"{source}: this LensNet reads {fields.get('features', 'other')} "
      f"features, not {lens_features.FEATURES}: train it again from it by "
      f"experiments.train_lensnet --config.initial={source}")
  return _with_keys_of(params, config), config, None


def _with_keys_of(params, config: lensnet.LensNetConfig):
  """Fresh scores, and the keys that stand in trees."""
  fresh = lensnet.init_params(config)
  return fresh | {k: params[k] for k in ("keys",) if k in params}


def _grow(params, features: int | None) -> int | None:
  """Lets scores that end before the last features read those as nothing.

  Features are added behind the others. Their scale is 0 until they are taught.

  Returns:
    the number of features that the scores read now.
  """
  if features not in _GROWN:
    return features
  new = lens_features.FEATURES - features
  constant = sum(i < features for i in lens_features.CONSTANT)
  more = len(lens_features.CONSTANT) - constant
  for part in (params[name] for name in ("score", "text") if name in params):
    for name in ("mean", "scale"):
      part[name] = np.pad(part[name], (0, new))
    for name in ("feature_in", "project_features"):
      if name in part:
        part[name]["kernel"] = np.pad(
          part[name]["kernel"], ((0, new), (0, 0)))
    facts = part["facts"]["kernel"]
    part["facts"]["kernel"] = np.insert(
      facts, [constant] * more, 0.0, axis=0)
  return lens_features.FEATURES


def _check_table(path, params, lm: BaseLM) -> None:
  """Refuses a table of keys of another vocabulary."""
  rows = len(params.get(TABLE, {}).get("vectors", ()))
  if rows != lm.config.vocab_size:
    raise McjaxError(f"{path}: its table of keys has {rows} tokens, but "
                     f"{lm.name} has {lm.config.vocab_size}")


def read_initial(lm: BaseLM, path=None) -> tuple[dict | None, dict | None]:
  """What training can start from of given or shipped weights, and their card.

  None where there are none. Scores of an older LensNet, and a choice of
  sentences by other features, are left out.
  """
  path = path or pretrained.shipped(lm.name, "lensnet")
  if path is None:
    return None, None
  params, fields, card = pretrained.read_weights(path, "lensnet")
  if fields.get("gists", True) and (
      fields.get("d_model") != lm.config.d_model):
    return None, None
  if _grow(params, fields.get("features")) != lens_features.FEATURES:
    params.pop("score", None)
    params.pop("text", None)
  if not sentence_net.fits(params):
    params.pop(sentence_net.PART)
  return params, card
