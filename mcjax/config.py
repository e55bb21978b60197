"""The loop's configuration: one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses

from mcjax.types import BRANCHING, McjaxError

POLICIES = ("auto", "lensnet", "similarity", "recency", "random", "oracle")
KV_MODES = ("splice", "exact")
GIST_ATTENTION = ("auto", "visible", "masked")
RAW_ATTENTION = ("sentences", "blocks", "all")
READ_PLACES = ("turn", "before")
MIN_WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Config:
  """Constants of the loop.

  Attributes:
    window: W_max, slots of the working context; one slot per entry. The block
      that is being read or written has 32 more until it is done.
    policy: who scores the entries: lensnet (learned), similarity (tree search
      by token statistics), recency, random, oracle (counterfactual; needs the
      continuation, so only in `score`); auto is lensnet where trained weights
      fit base and GistNet, else similarity.
    kv: splice runs the LM on swapped-in entries only; exact rebuilds the
      whole window's cache after every edit (the reference).
    refocus_every: tokens between refocus steps, a multiple of 32.
    max_edits: N_diff, edits per refocus step.
    cooldown: refocus steps during which an entry made by one action is
      barred from the opposite one.
    threshold: tau; scores within +-tau cause no voluntary edit.
    settle_steps: refocus steps at most after a prompt was ingested.
    search_nodes: tree nodes a search may touch per refocus step; LensNet's for
      a prompt touches those of all `settle_steps` at once. Below 1M tokens it
      reads all its L1 keys instead of searching by them.
    gist_attention: whether the LM attends to gists; auto does what the
      GistNet's model card measured to be best at this window, and masks
      untrained ones.
    gists_seen: of visible gists the newest ones, so many; 0 for all.
    raw_attention: what the LM attends to of the raw text before a question.
      "sentences": where sentences answer it, these and the history's first
      token alone; "blocks": instead of the sentences the blocks of 32 tokens
      that hold them; "all": everything; "" is what the base's card has
      (`mcjax.pretrained.cards`).
    read_tokens: tokens of such sentences that are read at most; 0 is what the
      card has.
    read_share: how likely another sentence must be to tell the answer, as a
      share of the best one's, to be read (of its match with the question, where
      nothing was learned); 0 is what the card has.
    read_place: where such sentences stand: "turn", inside the user's turn, or
      "before" it; "" is what the card has.
    contrast: how much an answer that is read from such text alone leans on
      what it adds to what the base says without it (context-aware decoding,
      two forward passes a token); 0 leaves it out, None is what the card has.
    gist_stride: positions one gist advances (1 compact ... 32 true span);
      reduced automatically so that the window fits the base's range. None
      where the LM does not attend to gists.
    sink_tokens: first tokens of the history pinned at L0 (StreamingLLM).
    recent_tokens: newest tokens at L0 at cold start; 0 fills what the window
      has room for.
    gists_per_level: nodes kept at each level at cold start, nearest first;
      where recent_tokens is 0, no more than the LM sees.
    protect_tokens: newest tokens that are never collapsed; of those before a
      question none.
    renew_tokens: newest tokens run again after an expand, so that they read
      the new detail; 1 renews the logits only.
    refresh_every: refocus steps between full rebuilds of the cache in splice
      mode; 0 never.
    delta_nll_every: refocus steps between probes of the change in NLL of the
      newest tokens, recorded in telemetry; 0 never (a probe costs 64
      token-forwards).
    chat: auto wraps prompts in the base's chat template where it has one;
      plain never does.
    temperature: 0 is greedy.
    seed: of sampling and of the random policy.
    check_invariants: verify every invariant after every edit (slow).
    telemetry_path: JSONL file of step records; none by default.
  """

  window: int = 2048
  policy: str = "auto"
  kv: str = "splice"
  refocus_every: int = 32
  max_edits: int = 4
  cooldown: int = 2
  threshold: float = 0.2
  settle_steps: int = 24
  search_nodes: int = 256
  gist_attention: str = "auto"
  gists_seen: int = 0
  raw_attention: str = ""
  read_tokens: int = 0
  read_share: float = 0.0
  read_place: str = ""
  contrast: float | None = None
  gist_stride: int = 1
  sink_tokens: int = 32
  recent_tokens: int = 0
  gists_per_level: int = 64
  protect_tokens: int = 64
  renew_tokens: int = 1
  refresh_every: int = 0
  delta_nll_every: int = 0
  chat: str = "auto"
  temperature: float = 0.0
  seed: int = 0
  check_invariants: bool = False
  telemetry_path: str | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      self._check_type(field.name, field.default)
    self._one_of("policy", POLICIES)
    self._one_of("kv", KV_MODES)
    self._one_of("gist_attention", GIST_ATTENTION)
    self._one_of("chat", ("auto", "plain"))
    self._require("raw_attention", self.raw_attention in ("", *RAW_ATTENTION),
                  "sentences, blocks, all or empty")
    self._require("read_place", self.read_place in ("", *READ_PLACES),
                  "turn, before or empty")
    for name in ("window", "refocus_every", "sink_tokens", "recent_tokens",
                 "protect_tokens"):
      self._require(
        name, getattr(self, name) % BRANCHING == 0, f"a multiple of {BRANCHING}"
      )
    self._require("window", self.window >= MIN_WINDOW, f">= {MIN_WINDOW}")
    for name, low in (
      ("refocus_every", BRANCHING), ("max_edits", 1), ("cooldown", 0),
      ("settle_steps", 0), ("search_nodes", BRANCHING), ("gist_stride", 1),
      ("sink_tokens", 0), ("recent_tokens", 0), ("gists_per_level", 0),
      ("read_tokens", 0), ("gists_seen", 0),
      ("protect_tokens", BRANCHING), ("renew_tokens", 1), ("refresh_every", 0),
      ("delta_nll_every", 0), ("seed", 0),
    ):
      self._require(name, getattr(self, name) >= low, f">= {low}")
    for name in ("gist_stride", "renew_tokens"):
      self._require(name, getattr(self, name) <= BRANCHING, f"<= {BRANCHING}")
    self._require("threshold", 0.0 <= self.threshold < 1.0, "in [0, 1)")
    self._require("read_share", 0.0 <= self.read_share <= 1.0, "in [0, 1]")
    self._require(
      "contrast", self.contrast is None or self.contrast >= 0.0, ">= 0")
    self._require("temperature", self.temperature >= 0.0, ">= 0")
    for name in ("sink_tokens", "protect_tokens"):
      self._require(
        name, getattr(self, name) <= self.window // 4, "<= window / 4"
      )

  def _require(self, name: str, ok: bool, rule: str) -> None:
    if not ok:
      raise McjaxError(
        f"config.{name} must be {rule}, got {getattr(self, name)}"
      )

  def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
    self._require(name, getattr(self, name) in choices,
                  "one of " + ", ".join(choices))

  def _check_type(self, name: str, default) -> None:
    value = getattr(self, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "contrast":
      self._require(name, value is None or number, "a number or None")
    elif default is None:
      ok = value is None or isinstance(value, str)
      self._require(name, ok, "a path or None")
    elif isinstance(default, bool):
      self._require(name, isinstance(value, bool), "True or False")
    elif isinstance(default, float):
      self._require(name, number, "a number")
    elif isinstance(default, int):
      ok = isinstance(value, int) and not isinstance(value, bool)
      self._require(name, ok, "a whole number")
    else:
      self._require(name, isinstance(value, str), "a string")
