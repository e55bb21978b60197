"""What the tests of LensNet's rows and policy share: a history, its view."""

from mcjax import Config, MegaContext
from mcjax.testing import tiny_base
from mcjax.window.focus_view import FocusView


def view_of(mc, query_start=None):
  window = mc._loop.context.window
  query = mc._loop.query
  return FocusView(
    window.entries, mc.tree, query.ids, query.weights,
    query.start if query_start is None else query_start, False, 0, False,
    context_lm=mc._loop.context)


def opened(tiny_lm, tiny_gistnet, count, text=None, policy=None, **config):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(**{"window": 512, "policy": "lensnet", "recent_tokens": 64,
              "gists_per_level": 8, **config}),
    gistnet=tiny_gistnet, lensnet=policy,
  )
  mc.ingest(tiny_base.text(count) if text is None else text)
  return mc
