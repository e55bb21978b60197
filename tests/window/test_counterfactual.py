"""Counterfactual losses against the window with the edit made."""

import numpy as np
import pytest

from mcjax.config import Config
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING
from mcjax.window import counterfactual
from mcjax.window.context_lm import ContextLM
from mcjax.window.working_context import COLLAPSE, EXPAND

CURSOR = 900


@pytest.fixture(scope="module")
def tree(tiny_gistnet):
  """A history of random tokens."""
  return tiny_base.random_tree(tiny_gistnet, 1100, 5)


def _context(lm, tree, raw):
  """All of the history up to CURSOR as gists, but for the blocks `raw`."""
  nodes = []
  for block in range(CURSOR // BRANCHING):
    first = block * BRANCHING
    nodes += ([(0, first + k) for k in range(BRANCHING)] if block in raw
              else [(1, block)])
  nodes += [(0, i) for i in range(CURSOR // BRANCHING * BRANCHING, CURSOR)]
  context = ContextLM(lm, Config(window=512), show_gists=True)
  context.window.retile(nodes)
  context.load_unready(tree)
  context.sync()
  return context


def _nll(context, tree, ahead):
  """Mean NLL of what follows, run behind the window."""
  slots = context.window.take_slots(len(ahead))
  context.window.append_tokens(slots)
  context.load_unready(tree)
  context.sync(renew=len(ahead) + 1)
  return context.newest_nll(ahead).mean()


@pytest.mark.parametrize("action, entry", [(COLLAPSE, 2), (EXPAND, 52)])
def test_an_edit_costs_what_it_would_in_earnest(tiny_lm, tree, action, entry):
  """Where gists are seen, through an adapter."""
  lm = tiny_base.adapted(tiny_lm)
  ahead = tree.tokens(CURSOR, CURSOR + BRANCHING)
  context = _context(lm, tree, raw=(2,))
  base, losses = counterfactual.edit_losses(
    context, tree, [counterfactual.Candidate(action, entry)], ahead)
  edited = _context(lm, tree, raw=(2,))
  edit = (edited.window.expand if action == EXPAND else
          edited.window.collapse)
  edit(entry, step=0)
  edited.load_unready(tree)
  assert losses[0] == pytest.approx(_nll(edited, tree, ahead), abs=1e-4)
  assert base == pytest.approx(_nll(context, tree, ahead), abs=1e-4)
  assert abs(losses[0] - base) > 1e-4


def test_a_slope_is_what_a_little_less_of_an_entry_costs(tiny_lm, tree):
  """As differences say where an entry's values are a little smaller."""
  ahead = tree.tokens(CURSOR, CURSOR + BRANCHING)
  context = _context(tiny_lm, tree, raw=(2,))
  slopes = counterfactual.slot_gradients(context, tree, ahead)
  entries, step = context.window.entries, 0.05
  assert slopes.shape == (len(entries),)
  for at in (2, 20, len(entries) - 2):
    cost = []
    for gain in (1 - step, 1 + step):
      changed = _context(tiny_lm, tree, raw=(2,))
      slot = int(changed.window.entries.slot[at])
      state = changed.state
      changed.state = state._replace(
        values=state.values.at[..., slot, :].multiply(gain))
      cost.append(counterfactual.edit_losses(changed, tree, [], ahead)[0])
    assert slopes[at] == pytest.approx(
      (cost[0] - cost[1]) / (2 * step), rel=0.02, abs=2e-6)
  assert np.abs(slopes).max() > 1e-4
