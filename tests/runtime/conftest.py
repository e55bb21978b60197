"""What the tests of engines compare with."""

import pytest
from runtime_cases import SMALL, life_of

from mcjax import Config, MegaContext
from mcjax.testing import tiny_base


@pytest.fixture(scope="session")
def lives_alone(tiny_lm, tiny_gistnet):
  """What so many histories say when each is by itself."""
  known = []

  def of(count):
    for i in range(len(known), count):
      with MegaContext.create(tiny_base.memory_url(), tiny_lm, Config(**SMALL),
                              gistnet=tiny_gistnet) as mc:
        known.append(life_of(mc, i))
    return known[:count]

  return of
