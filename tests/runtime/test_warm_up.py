"""Programs compiled in a thread, beside a first answer and after it."""

import threading
import time

import pytest

from mcjax.runtime import focus, warm_up
from mcjax.runtime.telemetry import compile_count
from mcjax.testing import tiny_base

_QUESTIONS = ("PUMP CODE?", "~~~")


def compiling() -> list[threading.Thread]:
  return [t for t in threading.enumerate() if t.name == "mcjax-compile"]


def told(mc) -> list[str]:
  mc.ingest(tiny_base.text(700))
  return [mc.generate(question, 40).text for question in _QUESTIONS]


@pytest.fixture
def large(make, monkeypatch):
  """Makes histories of a base that counts as large."""
  expected = told(make())
  monkeypatch.setattr(focus, "_LAYERS", 0)
  return make, expected


def test_answers_are_the_same_and_nothing_compiles_in_the_end(
    large, monkeypatch):
  monkeypatch.setattr(warm_up, "_PAUSE", 0.0)
  make, expected = large
  mc = make()
  assert not compiling()  # an engine may still take it
  assert told(mc) == expected
  for thread in compiling():
    thread.join()
  before = compile_count()
  mc.score(tiny_base.text(70, 1))
  mc.generate("Go on", 70, temperature=1.0)
  mc.next_logits()
  assert compile_count() == before


def test_the_rest_waits_for_a_pause_and_closing_ends_it(large, monkeypatch):
  begun = []
  monkeypatch.setattr(focus.ContextLM, "programs", lambda *_: map(
    begun.append, range(3)))
  make, _ = large
  with make() as mc:
    mc.generate("~~~", 3)
    time.sleep(3 * warm_up._GLANCE)
    assert begun == [0] and compiling()
  for thread in compiling():
    thread.join()
  assert begun == [0]


def test_what_fails_ahead_is_met_where_it_is_used(large, monkeypatch):
  monkeypatch.setattr(focus.ContextLM, "programs", lambda *_: iter([1 / 0]))
  make, _ = large
  mc = make()
  for _ in range(2):
    assert len(mc.generate("~~~", 3).token_ids) == 3
