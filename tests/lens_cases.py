"""What the tests of LensNet's rows and policy share: a history, its view."""

import dataclasses

import numpy as np

from mcjax import Config, MegaContext
from mcjax.testing import tiny_base


def view_of(mc, **changes):
  """What a policy sees of text that is read on."""
  return dataclasses.replace(mc._loop.view(), **changes)


def asked_view(mc, question):
  """What it sees of a question about the history as it is."""
  ids = np.asarray(mc.lm.tokenizer.encode(question), np.int32)
  return view_of(
    mc, query_start=mc.cursor, asked=True, query_ids=ids,
    query_weights=np.ones(len(ids), np.float32))


def opened(tiny_lm, tiny_gistnet, count, text=None, policy=None, **config):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(**{"window": 512, "policy": "lensnet", "recent_tokens": 64,
              "gists_per_level": 8, **config}),
    gistnet=tiny_gistnet, lensnet=policy,
  )
  mc.ingest(tiny_base.text(count) if text is None else text)
  return mc
