"""Many histories at once say what each says alone, and compile nothing."""

import gc
import threading

import jax
import numpy as np
import pytest
from runtime_cases import (
  QUESTION,
  SMALL,
  ask_at_once,
  life_of,
  lived_together,
)

from mcjax import Config, Engine, McjaxError
from mcjax.runtime.telemetry import compile_count
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING
from mcjax.window.row_cache import prior_slots


@pytest.mark.parametrize("count, splices", [
  (4, 1), pytest.param(4, 3, marks=pytest.mark.slow),
  pytest.param(16, 1, marks=pytest.mark.slow),
  pytest.param(16, 8, marks=pytest.mark.slow)])
def test_many_at_once_say_what_each_says_alone(
    tiny_lm, tiny_gistnet, lives_alone, count, splices):
  """Through joins, leaves and refocuses, under different samplings."""
  with Engine(tiny_lm, Config(**SMALL), slots=count, splices=splices,
              gistnet=tiny_gistnet) as engine:
    assert lived_together(engine, count, life_of) == lives_alone(count)
    assert engine.rows > engine.blocks > 0
    done, runs = engine.spliced
    assert (done > runs) == (splices > 1)


@pytest.mark.parametrize("steps, splices", [
  (40, 2), pytest.param(1000, 1, marks=pytest.mark.slow),
  pytest.param(1000, 2, marks=pytest.mark.slow)])
def test_nothing_compiles_once_it_is_warm(
    tiny_lm, tiny_gistnet, steps, splices):
  """However histories come, go, are refocused and sampled."""
  rng, config = np.random.RandomState(0), Config(**SMALL)
  with Engine(tiny_lm, config, slots=3, splices=splices, gistnet=tiny_gistnet
              ) as engine:
    engine.warm_up()
    histories = {}

    def step(mc, pick, more):
      if pick == 0:
        mc.ingest(tiny_base.text(50 + more, more))
      mc.generate(
        QUESTION if pick % 3 == 1 else "go on", 1 + more % 70,
        temperature=pick % 4 / 2, top_k=more % 9, top_p=1 - more % 5 / 10,
        repetition_penalty=1 + more % 3 / 10, min_p=more % 7 / 100,
        remember=bool(more % 2), top_logprobs=more % 4,
        stop=["e"] if pick == 5 else (), on_piece=[None, len][more % 2])

    step(engine.create(tiny_base.memory_url()), 0, 1)  # all kinds once
    step(engine.histories[0], 1, 2)
    engine.histories[0].close()
    before, blocks = compile_count(), engine.blocks
    while engine.blocks - blocks < steps:
      for i in range(3):
        if i in histories and rng.rand() < 0.2:
          histories.pop(i).close()
        if i not in histories:
          histories[i] = engine.create(tiny_base.memory_url())
          histories[i].ingest(tiny_base.text(300 + 200 * i, i))
      threads = [
        threading.Thread(target=step, args=(
          mc, int(rng.randint(6)), int(rng.randint(100))))
        for mc in histories.values()]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    for mc in engine.histories:
      mc.close()
    ask_at_once(engine, 3)
    assert compile_count() == before
    done, runs = engine.spliced
    assert (done > runs) == (splices > 1)


def test_a_further_history_costs_its_keys_and_values(tiny_lm, tiny_gistnet):
  """Those of its window, and of the prompt that answers are held against."""
  def resident(slots):
    with Engine(tiny_lm, Config(**SMALL), slots=slots, gistnet=tiny_gistnet
                ) as engine:
      for i in range(slots):
        life_of(engine.create(tiny_base.memory_url()), i)
      gc.collect()
      return sum(a.nbytes for a in jax.live_arrays())

  c = tiny_lm.config
  slot = 2 * c.n_layers * c.n_kv_heads * c.head_dim * 4
  slots = SMALL["window"] + BRANCHING
  own = slot * (slots + prior_slots(slots))
  assert own <= resident(4) - resident(3) <= 1.1 * own


def test_work_that_is_cut_off_costs_the_others_time_alone(
    tiny_lm, tiny_gistnet):
  """One history's splice loses the cache of all rows; nobody says otherwise."""
  config, said = Config(**SMALL), []
  for cut_off in (False, True):
    with Engine(tiny_lm, config, slots=3, gistnet=tiny_gistnet) as engine:
      mc = engine.create(tiny_base.memory_url())
      mc.ingest(tiny_base.text(300, 1))

      def lose(text, decoder=mc.context.decoder, lost=cut_off):
        if lost:
          with decoder.turn:
            decoder._caches[0].take()  # and never given back

      said.append(mc.generate("go on", 70, on_text=lose).token_ids.tolist())
      assert (engine.tokens, mc.context.decoder.lost > 0) == (70, cut_off)
  assert said[0] == said[1]


@pytest.mark.parametrize("splices", [0, 3, "2"])
def test_splices_are_at_most_the_slots(tiny_lm, tiny_gistnet, splices):
  with pytest.raises(McjaxError, match=r"splices must be .* in \[1, 2\]"):
    Engine(tiny_lm, slots=2, splices=splices, gistnet=tiny_gistnet)


def test_what_is_lost_is_not_taken_for_ready_after_an_answer(
    tiny_lm, tiny_gistnet):
  """The window that is put back has nothing in its slots either."""
  with Engine(tiny_lm, Config(**SMALL), slots=2, gistnet=tiny_gistnet
              ) as engine:
    ask_at_once(engine, 1)
    mc, said = engine.histories[0], []
    for n in range(3):
      said.append(mc.generate(QUESTION, 9, remember=False).text)
      if n == 0:
        for cache in mc.context.decoder._caches:
          cache.take()  # and never given back
    assert said == said[:1] * 3


def test_a_full_engine_says_so_and_a_closed_history_makes_room(
    tiny_lm, tiny_gistnet):
  config = Config(**SMALL)
  with Engine(tiny_lm, config, slots=1, gistnet=tiny_gistnet) as engine:
    first = engine.create(tiny_base.memory_url())
    with pytest.raises(McjaxError, match="slots are taken"):
      engine.create(tiny_base.memory_url())
    first.close()
    engine.create(tiny_base.memory_url())
