"""Config: defaults of the design, and errors that name the field."""

import dataclasses

import pytest

from mcjax import Config, McjaxError
from mcjax.config import POLICIES


def test_defaults_are_those_of_the_design():
  config = Config()
  assert dataclasses.asdict(config) | dict(
    window=2048, policy="auto", kv="splice", refocus_every=32,
    max_edits=4, cooldown=2, threshold=0.2, settle_steps=24, recent_tokens=0,
    gists_per_level=64, gist_stride=1,
  ) == dataclasses.asdict(config)
  assert config.gists_per_level * 32 == 2048  # cold start: 2,048 at L1


def test_it_is_frozen_hashable_and_comparable():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().window = 1024
  assert Config() == Config() != Config(window=1024)
  assert hash(Config()) == hash(Config())
  assert Config(**dataclasses.asdict(Config(seed=3))) == Config(seed=3)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_accepted(policy):
  assert Config(policy=policy).policy == policy


@pytest.mark.parametrize("field, value", [
  ("window", 224), ("window", 513), ("window", 0), ("window", -512),
  ("window", 1024.0), ("window", "2048"), ("window", None), ("window", True),
  ("policy", "best"), ("policy", None), ("policy", 3), ("policy", ""),
  ("kv", "fast"), ("kv", True),
  ("refocus_every", 16), ("refocus_every", 0), ("refocus_every", 33),
  ("max_edits", 0), ("max_edits", 2.0), ("max_edits", -1),
  ("cooldown", -1), ("cooldown", 0.5),
  ("threshold", 1.0), ("threshold", -0.1), ("threshold", float("nan")),
  ("threshold", "0.2"), ("threshold", True),
  ("settle_steps", -1), ("search_nodes", 31), ("search_nodes", None),
  ("gist_attention", "on"), ("gist_attention", True),
  ("gist_stride", 0), ("gist_stride", 33),
  ("sink_tokens", -32), ("sink_tokens", 31), ("sink_tokens", 1024),
  ("recent_tokens", -32), ("recent_tokens", 40),
  ("gists_per_level", -1), ("protect_tokens", 0), ("protect_tokens", 544),
  ("refresh_every", -1), ("delta_nll_every", -5),
  ("chat", "always"), ("temperature", -0.1), ("temperature", float("nan")),
  ("seed", -1), ("seed", 1.5), ("check_invariants", 1),
  ("read_share", 1.5), ("read_share", None), ("contrast", "much"),
  ("read_place", "after"), ("read_place", None),
  ("contrast", True), ("telemetry_path", 3), ("telemetry_path", True),
])
def test_a_bad_value_names_its_field_in_one_line(field, value):
  with pytest.raises(McjaxError, match=rf"config\.{field} must be ") as caught:
    Config(**{field: value})
  assert "\n" not in str(caught.value) and str(value) in str(caught.value)


def test_an_unknown_field_is_refused():
  with pytest.raises(TypeError, match="windows"):
    Config(windows=512)
