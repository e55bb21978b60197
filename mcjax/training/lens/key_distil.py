"""Teaches keys what a sentence embedding finds alike.

The table of `mcjax.lens.keyer.LensKeyer` has a vector and two saliences per
vocabulary entry. It starts as the teacher's embeddings of the single tokens,
their principal components, and learns, for questions and sentences of training
text, the order in which the teacher likes blocks: the cross-entropy of softmax
distributions over the blocks nearest to a question and random ones.

Sources: static embeddings from token embeddings (model2vec), listwise
distillation (arXiv:2010.11386).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import re
from typing import Any, NamedTuple, Protocol

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mcjax.parallel import places, processes
from mcjax.settings import read_fields
from mcjax.training.common.data import TokenStore
from mcjax.types import BRANCHING, Array, McjaxError

_MARGIN = 8  # tokens beside a block that the teacher reads too
_QUERY = 40  # tokens of a question, padded
_CHUNK = 4096  # texts between two records
_READ = 4096  # tokens in which questions are looked for
_WORDS = r"[A-Z][^.?!\n<>{}=]"
_QUESTION = re.compile(_WORDS + r"{14,140}\?")
_STATEMENT = re.compile(_WORDS + r"{24,140}\.(?=\s)")
_IDLE = 300  # documents without a new question, after which there is none
_SIF = 2e-4  # tokens more frequent than this count less (arXiv:1703.00091)


class Teacher(Protocol):
  """A sentence embedding."""

  def encode(self, texts: Sequence[str], longest: int) -> np.ndarray:
    """Unit vectors [n, E] of texts, each cut to `longest` word pieces."""


@dataclasses.dataclass(frozen=True)
class KeyConfig:
  """What is drawn and how it is learned; validated.

  Attributes:
    key_dim: K.
    blocks, questions: of training text; statements come beside the questions.
    block_mixture, question_mixture: (kind of text, share); where the store
      holds none of these, all its kinds have equal shares.
    steps, batch, learning_rate, clip: of Adam, with a cosine.
    near: blocks nearest to a question by the teacher, two of them in a step.
    sharpness: factor of the teacher's cosine in its softmax.
    seed: of everything drawn.
  """

  key_dim: int = 128
  blocks: int = 60000
  questions: int = 25000
  block_mixture: tuple[tuple[str, float], ...] = (
    ("prose", 0.3), ("wiki", 0.27), ("chat", 0.15), ("docs", 0.18),
    ("code", 0.1))
  question_mixture: tuple[tuple[str, float], ...] = (
    ("prose", 0.45), ("wiki", 0.15), ("chat", 0.25), ("docs", 0.15))
  steps: int = 1600
  batch: int = 256
  learning_rate: float = 3e-3
  clip: float = 1.0
  near: int = 64
  sharpness: float = 20.0
  seed: int = 11

  def __post_init__(self):
    for name in ("key_dim", "blocks", "questions", "steps", "batch", "near"):
      if getattr(self, name) < 1:
        raise McjaxError(f"config.distil.{name} must be ≥ 1, got "
                         f"{getattr(self, name)}")
    if self.near >= self.blocks:
      raise McjaxError(f"config.distil.near={self.near} needs more than "
                       f"config.distil.blocks={self.blocks}")


def read_config(values: Mapping[str, Any]) -> KeyConfig:
  """A `KeyConfig` of plain values.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  return read_fields(KeyConfig, "distil", values)


class Texts(NamedTuple):
  """Blocks and questions as tokens, and what the teacher makes of them.

  Attributes:
    blocks: [N, 32] int32.
    block_vectors: [N, E] float32.
    questions: [M, 40] int32, -1 for none.
    question_vectors: [M, E] float32.
    token_vectors: [V, E] float32.
  """

  blocks: np.ndarray
  block_vectors: np.ndarray
  questions: np.ndarray
  question_vectors: np.ndarray
  token_vectors: np.ndarray


def draw_blocks(stores: Mapping[str, TokenStore], config: KeyConfig
                ) -> np.ndarray:
  """Blocks of random documents with their margins, [N, 48] int32."""
  rng = np.random.default_rng(config.seed)
  length, out = BRANCHING + 2 * _MARGIN, []
  for _ in range(config.blocks):
    ids = _draw_document(stores, config.block_mixture, rng, 2 * BRANCHING)
    at = int(rng.integers(0, len(ids) - length))
    out.append(ids[at : at + length])
  return np.array(out, np.int32)


def draw_questions(stores: Mapping[str, TokenStore], tokenizer,
                   config: KeyConfig) -> list[str]:
  """Questions that stand in the text, and a few statements, in random order.

  Where the text holds too few questions, statements take their place.
  """
  rng = np.random.default_rng(config.seed)
  asked: dict[str, None] = {}
  said: dict[str, None] = {}
  idle = 0
  while len(asked) < config.questions:
    ids = _draw_document(stores, config.question_mixture, rng, 1)
    at = int(rng.integers(0, max(1, len(ids) - _READ)))
    text = tokenizer.decode(ids[at : at + _READ].tolist())
    before = len(asked)
    asked |= dict.fromkeys(_QUESTION.findall(text))
    idle = idle + 1 if len(asked) == before else 0
    if idle > _IDLE:
      if len(asked) + len(said) >= config.questions:
        break
      raise McjaxError(f"the text holds only {len(asked)} questions and "
                       f"{len(said)} statements; lower config.distil.questions")
    found = _STATEMENT.findall(text)
    said |= dict.fromkeys(
      found[i] for i in rng.permutation(len(found))[:2])
  texts = [*asked, *said]
  return [texts[i] for i in rng.permutation(len(texts))]


def _draw_document(stores, mixture, rng, shortest: int) -> np.ndarray:
  """A document of at least `shortest` tokens."""
  held = {k: share for k, share in mixture if k in stores}
  held = held or dict.fromkeys(sorted(stores), 1.0)
  shares = np.array(list(held.values()))
  kind = str(rng.choice(list(held), p=shares / shares.sum()))
  store = stores[kind]
  if np.diff(store.offsets).max(initial=0) < shortest:
    raise McjaxError(f"no document of kind {kind} has {shortest} tokens")
  while True:
    ids = store.document(int(rng.integers(len(store.names))))
    if len(ids) >= shortest:
      return ids


def read(stores: Mapping[str, TokenStore], tokenizer, vocab_size: int,
         teacher: Teacher, config: KeyConfig, folder,
         token_vectors: bool = True) -> Texts:
  """Draws the texts and asks the teacher; what is in `folder` is kept.

  Args:
    stores: {kind: TokenStore} of the training split.
    tokenizer: of the base.
    vocab_size: V.
    teacher: reads the texts.
    config: see there.
    folder: of records, so that a killed run goes on.
    token_vectors: whether to ask for those of single tokens, which only
      training needs.
  """
  folder = places.place(folder)
  spans = draw_blocks(stores, config)
  asked = draw_questions(stores, tokenizer, config)
  encode = functools.partial(_encoded, teacher, folder)
  padded = np.full((len(asked), _QUERY), -1, np.int32)
  for row, text in zip(padded, asked):
    ids = tokenizer.encode(text)[:_QUERY]
    row[: len(ids)] = ids
  return Texts(
    spans[:, _MARGIN:-_MARGIN],
    encode("blocks", [tokenizer.decode(s.tolist()) for s in spans], 50),
    padded, encode("questions", asked, 26),
    encode("tokens", [tokenizer.decode([i]).strip() or "."
                      for i in range(vocab_size)], 6)
    if token_vectors else np.zeros((0, 0), np.float32))


def _encoded(teacher: Teacher, folder: epath.Path, name: str,
             texts: list[str], longest: int) -> np.ndarray:
  """The teacher's vectors [n, E] float32 of texts, recorded by chunks.

  Processes share the chunks.
  """
  files = []
  with processes.StopSignal() as stop:
    for number, a in enumerate(tqdm.tqdm(
        range(0, len(texts), _CHUNK), desc=name, unit="chunk",
        disable=not processes.is_first())):
      part = texts[a : a + _CHUNK]
      digest = hashlib.blake2b("\0".join(part).encode(), digest_size=8)
      path = folder / f"{name}-{number:04d}-{digest.hexdigest()}.npy"
      if processes.is_mine(number) and not path.exists():
        places.save_array(
          path, teacher.encode(part, longest).astype(np.float16))
      files.append(path)
      stop.check()
  processes.barrier(f"{name} are read")
  return np.concatenate([places.load_array(path) for path in files]
                        ).astype(np.float32)


def split(texts: Texts, blocks: int, questions: int) -> tuple[Texts, Texts]:
  """Texts without the last `blocks` and `questions`, and these alone."""
  t, n, m = texts, len(texts.blocks) - blocks, len(texts.questions) - questions
  if min(n, m) < 1:
    raise McjaxError("too few texts to keep some for validation")

  def part(b: slice, q: slice) -> Texts:
    return Texts(t.blocks[b], t.block_vectors[b], t.questions[q],
                 t.question_vectors[q], t.token_vectors)

  return (part(slice(n), slice(m)),
          part(slice(n, None), slice(m, None)))


def start(texts: Texts, config: KeyConfig, embeddings: np.ndarray
          ) -> dict[str, np.ndarray]:
  """Parameters from the teacher's vectors of single tokens.

  Args:
    texts: see `Texts`.
    config: see there.
    embeddings: [V, D] of the base.

  Returns:
    "vectors" [V, K] principal components; "key" and "query" [V] saliences
    before softplus, lower for frequent tokens; "project" [D, K] and "salience"
    [D, 2], zero, what the base's embeddings add to these, which also teaches
    tokens that the texts lack; "sharpness" [] the logarithm of the student's.
  """
  vectors = texts.token_vectors
  counts = np.bincount(texts.blocks.ravel(), minlength=len(vectors)) + 1.0
  share = counts / counts.sum()
  weight = np.sqrt(share) / np.sqrt(share).sum()
  vectors = vectors - weight @ vectors
  spread = (vectors * weight[:, None]).T @ vectors
  axes = np.linalg.eigh(spread)[1][:, ::-1][:, : config.key_dim]
  table = vectors @ axes
  salience = np.log(np.expm1(np.maximum(_SIF / (_SIF + share), 1e-3)))
  width = embeddings.shape[1]
  return {k: np.asarray(v, np.float32) for k, v in {
    "vectors": table / table.std(), "key": salience, "query": salience,
    "project": np.zeros((width, config.key_dim)),
    "salience": np.zeros((width, 2)), "sharpness": 3.0}.items()}


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
  """Centred embeddings [V, D] float32 of unit mean square."""
  centred = np.asarray(embeddings, np.float32)
  centred = centred - centred.mean(axis=0)
  return centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 1e-6)


class Tables(NamedTuple):
  """What the parameters make of every token.

  Attributes:
    vectors: [V, K].
    salience: [V, 2] in keys and in queries.
  """

  vectors: jax.Array
  salience: jax.Array


def tables(params, rows: Array) -> Tables:
  """Tables of parameters as from `start` and `unit_rows` [V, D]."""
  own = jnp.stack([params["key"], params["query"]], axis=1)
  return Tables(params["vectors"] + rows @ params["project"],
                jax.nn.softplus(own + rows @ params["salience"]))


def _summed(tables: Tables, which: int, ids: Array) -> jax.Array:
  """Unit vectors [n, K] of ids [n, T], -1 for none."""
  at = jnp.maximum(ids, 0)
  weight = jnp.where(ids >= 0, tables.salience[at, which], 0.0)
  total = jnp.einsum("nt,ntk->nk", weight, tables.vectors[at])
  return total / jnp.sqrt(jnp.sum(total * total, -1, keepdims=True) + 1e-6)


def loss(params, rows, questions, liked, blocks, sharpness: float
         ) -> jax.Array:
  """Cross-entropy [] of student to teacher, less the teacher's entropy.

  Args:
    params: as from `start`.
    rows: [V, D] the base's embeddings, as from `unit_rows`.
    questions: [B, T] int32.
    liked: [B, N] float32 the teacher's cosines.
    blocks: [N, 32] int32.
    sharpness: of the teacher.
  """
  known = tables(params, rows)
  found = _summed(known, 1, questions) @ _summed(
    known, 0, blocks).T * jnp.exp(params["sharpness"])
  wanted = jax.nn.log_softmax(liked * sharpness)
  miss = wanted - jax.nn.log_softmax(found)
  return jnp.mean(jnp.sum(jnp.exp(wanted) * miss, axis=-1))


def train(texts: Texts, config: KeyConfig, embeddings: np.ndarray
          ) -> dict[str, np.ndarray]:
  """The trained parameters; arguments and result as of `start`."""
  near = _nearest(texts, config.near)
  params = jax.tree.map(jnp.asarray, start(texts, config, embeddings))
  rows = jnp.asarray(unit_rows(embeddings))
  rule = optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)))
  moments = rule.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, moments, rows, questions, liked, blocks):
    value, gradient = jax.value_and_grad(loss)(
      params, rows, questions, liked, blocks, config.sharpness)
    with jax.numpy_dtype_promotion("standard"):
      updates, moments = rule.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value

  rng = np.random.default_rng(config.seed)
  batch = min(config.batch, len(texts.questions))
  bar = tqdm.tqdm(range(config.steps), unit="step", dynamic_ncols=True,
                  disable=not processes.is_first())
  with processes.StopSignal() as stop:
    for _ in bar:
      asked = rng.permutation(len(texts.questions))[:batch]
      shown = np.concatenate([
        near[asked, rng.integers(0, config.near, batch)],
        near[asked, rng.integers(0, config.near, batch)],
        rng.integers(0, len(texts.blocks), 2 * batch)])
      liked = texts.question_vectors[asked] @ texts.block_vectors[shown].T
      params, moments, value = step(
        params, moments, rows, texts.questions[asked], liked,
        texts.blocks[shown])
      bar.set_postfix_str(f"loss {float(value):.3f}")
      stop.check()
  return jax.device_get(params)


def _nearest(texts: Texts, count: int) -> np.ndarray:
  """The blocks that the teacher likes best for each question, [M, count]."""
  out = np.zeros((len(texts.questions), count), np.int32)
  for a in range(0, len(out), 1024):
    liked = texts.question_vectors[a : a + 1024] @ texts.block_vectors.T
    out[a : a + 1024] = np.argpartition(-liked, count, axis=1)[:, :count]
  return out


def table(known: Tables) -> dict[str, np.ndarray]:
  """What `LensKeyer` reads: "vectors" [V, K] int8, "salience" [V, 2]."""
  vectors = np.asarray(known.vectors, np.float64)
  scale = np.abs(vectors).max(axis=1, keepdims=True) / 127 + 1e-12
  return {"vectors": np.rint(vectors / scale).astype(np.int8),
          "salience": np.asarray(known.salience * scale, np.float32)}


def agreement(known: Tables, texts: Texts) -> dict[str, float]:
  """How often the student finds the block that the teacher likes best.

  Returns:
    the share of questions for which it is the student's best, among its best
    eight, and the mean reciprocal rank; among all blocks of `texts`.
  """
  found = np.asarray(
    _summed(known, 1, texts.questions) @ _summed(known, 0, texts.blocks).T)
  liked = texts.question_vectors @ texts.block_vectors.T
  best = found[np.arange(len(found)), liked.argmax(axis=1)]
  rank = 1 + np.sum(found > best[:, None], axis=1)
  return {"best": float(np.mean(rank == 1)), "of 8": float(np.mean(rank <= 8)),
          "reciprocal rank": float(np.mean(1 / rank))}


def teach(texts: Texts, held: Texts, config: KeyConfig, embeddings: np.ndarray
          ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
  """Trains on `texts`.

  Returns:
    the table, and its `agreement` on `held` "before" and "after".
  """
  rows = unit_rows(embeddings)
  before, after = (tables(make(texts, config, embeddings), rows)
                   for make in (start, train))
  return table(after), {"before": agreement(before, held),
                        "after": agreement(after, held)}


def told(facts: Mapping[str, Mapping[str, float]], blocks: int) -> str:
  """Lines about the agreements that `teach` returns, among so many blocks."""
  return "\n".join(
    f"{name}, other questions among {blocks} blocks: "
    + ", ".join(f"{k} {v:.3f}" for k, v in values.items())
    for name, values in facts.items())
