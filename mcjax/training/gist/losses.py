"""What GistNet is trained on: a frozen decoder that sees only gists far away.

One window of text gives every signal at once. The teacher reads the window in
full. The student decodes the gists as a sequence, then every segment of the
window again, seeing its own tokens and the gists of all blocks before it; so
each token is a sample, at about the cost of one more pass over the window.

  kl        teacher's next-token distribution against the student's
  attend    attention outputs for the teacher's queries (attention_match.py)
  rebuild   the decoder repeats a block's tokens after reading its gist
  contrast  cosine similarity of a window's gists above a margin

Token p + 1 is always scored from position p, and only from raw tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import decoder_layer, model, rotation
from mcjax.gist import adapters
from mcjax.gist import encoder as gistnet
from mcjax.training.gist import attention_match
from mcjax.types import BRANCHING, McjaxError


@dataclasses.dataclass(frozen=True)
class Objective:
  """Shape and weights of the loss; hashable, a jit static.

  Attributes:
    window: tokens per window.
    segment: tokens of a segment (H), a multiple of 32.
    near: raw tokens between the gists and the scored ones, a multiple of 32.
    sink: keep the window's first block raw, as the runtime's attention sink.
    gist_stride: positions a gist takes; it sits at their centre.
    kl, attend, contrast, rebuild: weights of the terms.
    nll: weight of plain next-token loss beside the KL.
    margin: cosine similarity that the contrastive term tolerates.
    rebuild_blocks: blocks of every window that are repeated from their gists.
    kl_segments: random segments of a window that `kl` and `nll` score; None
      scores all. Fewer make the window cheaper beside `attend`.
    level: of the gists that are taught. At 2 the window is one stretch of
      1,024 tokens and a segment after it, see `level_loss.py`.
    foreign: the far text is another window's, and the teacher does without
      it, see `foreign_loss.py`.
    loop: the window is one of the loop, see `loop_loss.py`: a sink, `upper`
      gists of 1,024 tokens, gists of blocks, `near` raw tokens and a segment.
    key_value: the gists are keys and values, see `key_value_loss.py`.
    upper: such gists.
    expanded: blocks of the others that are raw.
    floor: weight of a token that far text does not help, in nats.
    early: extra weight of a segment's first tokens, halved every 8 tokens.
    chunk: tokens whose logits exist at one time.
    remat: what of the decoder's layers the backward pass computes again:
      "none", "dots" (all but the matrix products) or "layer".
    activations: dtype of the decoder's activations, "float32" or "bfloat16";
      norms, softmax, losses and all of GistNet stay float32.
    attention: of the decoder: "plain", "xla" or "cudnn", see
      `mcjax.base.fused_attention`.
  """

  window: int = 512
  segment: int = 32
  near: int = 0
  sink: bool = False
  gist_stride: int = 1
  kl: float = 1.0
  nll: float = 0.0
  attend: float = 0.0
  contrast: float = 0.05
  rebuild: float = 0.0
  margin: float = 0.2
  rebuild_blocks: int = 2
  kl_segments: int | None = None
  level: int = 1
  foreign: bool = False
  loop: bool = False
  key_value: bool = False
  upper: int = 0
  expanded: int = 0
  floor: float = 0.1
  early: float = 0.0
  chunk: int = 256
  remat: str = "none"
  activations: str = "float32"
  attention: str = "plain"

  def __post_init__(self):
    for name in ("window", "segment"):
      value = getattr(self, name)
      if value < BRANCHING or value % BRANCHING:
        raise McjaxError(f"Objective.{name} must be a positive multiple of "
                         f"{BRANCHING}, got {value}")
    if self.near % BRANCHING or self.near < 0:
      raise McjaxError(f"Objective.near must be a multiple of {BRANCHING}, got "
                       f"{self.near}")
    if not 1 <= self.gist_stride <= BRANCHING:
      raise McjaxError("Objective.gist_stride must be 1 to 32, got "
                       f"{self.gist_stride}")
    if self.level not in (1, 2):
      raise McjaxError(f"Objective.level must be 1 or 2, got {self.level}")
    if self.foreign and (self.level != 1 or self.sink):
      raise McjaxError("Objective.foreign goes with level 1 and no sink")
    if self.level == 2 and self.window != BRANCHING**2 + self.segment:
      raise McjaxError("Objective.window must be 1024 + segment at level 2, "
                       f"got {self.window}")
    for name, known in (("remat", model.REMAT),
                        ("activations", ("float32", "bfloat16"))):
      if getattr(self, name) not in known:
        raise McjaxError(f"Objective.{name} must be one of "
                         f"{', '.join(known)}, got {getattr(self, name)!r}")
    if self.key_value and (self.level != 1 or self.sink or self.foreign
                           or self.loop):
      raise McjaxError("Objective.key_value goes with level 1 and no sink")
    if self.loop:
      self._check_loop()
      return
    if self.upper or self.expanded:
      raise McjaxError("Objective.upper and expanded go with loop")
    if self.kl_segments is not None and not (
        0 < self.kl_segments <= max(1, len(self.starts))):
      raise McjaxError(f"Objective.kl_segments must be 1 to "
                       f"{len(self.starts)}, got {self.kl_segments}")
    if not self.starts:
      raise McjaxError("Objective.window leaves no segment with a gist to see: "
                       "lengthen it or shorten near and segment")

  def _check_loop(self):
    if self.foreign or self.level != 1:
      raise McjaxError("Objective.loop goes with level 1 and its own text")
    if not 0 <= self.upper or not 0 <= self.expanded <= self.lower - 1:
      raise McjaxError(
        "Objective.window must hold a sink of 32, 1024 * upper, more blocks "
        f"than are expanded, near and segment, got {self.window}")

  @property
  def lower(self) -> int:
    """Blocks of a loop window that are not part of an upper gist."""
    rest = self.window - self.near - self.segment - self.upper * BRANCHING**2
    return rest // BRANCHING - 1

  @property
  def starts(self) -> tuple[int, ...]:
    """First scored position of every segment that sees a gist."""
    first = self.near + BRANCHING * (2 if self.sink else 1)
    return tuple(range(first, self.window - self.segment + 1, self.segment))

  @property
  def index(self) -> np.ndarray:
    """[segments, near + segment] window positions of the segments' tokens."""
    reach = np.arange(self.near + self.segment)
    return np.asarray(self.starts)[:, None] - self.near + reach[None]


def embed(base_params, o: Objective, ids) -> jax.Array:
  """Embeddings [..., D] of ids, in the dtype of the activations."""
  return model.embed(base_params, ids, jnp.dtype(o.activations))


def _chunked(chunk: int, *arrays):
  """Splits axis 0 into chunks, the last one padded with zeros."""
  size = min(chunk, arrays[0].shape[0])
  pad = -arrays[0].shape[0] % size
  return tuple(
    jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(
      (-1, size) + a.shape[1:]) for a in arrays)


def _kl_chunk(base_params, kl_weight, nll_weight, teacher, student, targets,
              weights):
  """Weighted KL, NLL sums of a chunk and the gradient for `student`."""
  rows = []
  for hidden in (teacher, student):
    scores = model.unembed(base_params, hidden)
    top = jnp.max(scores, axis=-1, keepdims=True)
    raised = jnp.exp(scores - top)
    total = jnp.sum(raised, axis=-1, keepdims=True)
    size = (top + jnp.log(total))[:, 0]
    picked = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    rows.append((scores, raised / total, size, size - picked))
  (wanted, p, teacher_size, teacher_nll), (found, q, size, nll) = rows
  kl = jnp.sum(p * (wanted - found), axis=-1) + size - teacher_size
  slope = (kl_weight + nll_weight) * q - kl_weight * p
  if nll_weight:
    slope -= nll_weight * jax.nn.one_hot(
      targets, q.shape[-1], dtype=jnp.float32)
  slope = slope * weights[:, None]
  if "unembed" in base_params:
    gradient = decoder_layer.product("tv,dv->td", slope, base_params["unembed"])
  else:
    gradient = decoder_layer.product("tv,vd->td", slope, base_params["embed"])
  gradient = gradient.astype(student.dtype)
  sums = jnp.stack([jnp.sum(x * weights) for x in (kl, nll, teacher_nll)])
  return sums, gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def distribution_loss(student, base_params, teacher, targets, weights,
                      kl_weight: float, nll_weight: float, chunk: int):
  """Weighted sums of KL(teacher ‖ student) and NLL; logits never held whole.

  The gradient is computed in the same pass as the value, chunk by chunk, so
  that the vocabulary is multiplied only three times and nothing is stored.

  Args:
    student: [T, D] the student's final hidden states.
    base_params: the frozen decoder's parameters.
    teacher: [T, D] the teacher's final hidden states.
    targets: [T] int32 next tokens.
    weights: [T] float32.
    kl_weight, nll_weight: what the loss sums.
    chunk: positions per chunk.

  Returns:
    (loss [], sums [3]): loss = kl_weight * KL + nll_weight * NLL, and sums are
    (KL, student NLL, teacher NLL), in nats.
  """
  return _distribution_forward(student, base_params, teacher, targets, weights,
                               kl_weight, nll_weight, chunk)[0]


def _distribution_forward(student, base_params, teacher, targets, weights,
                          kl_weight, nll_weight, chunk):
  def step(total, piece):
    sums, gradient = _kl_chunk(base_params, kl_weight, nll_weight, *piece)
    return total + sums, gradient

  pieces = _chunked(chunk, teacher, student, targets, weights)
  sums, gradients = jax.lax.scan(step, jnp.zeros((3,), jnp.float32), pieces)
  gradient = gradients.reshape((-1, student.shape[-1]))[: student.shape[0]]
  loss = np.float32(kl_weight) * sums[0] + np.float32(nll_weight) * sums[1]
  return (loss, sums), gradient


def _distribution_backward(kl_weight, nll_weight, chunk, gradient, cotangents):
  del kl_weight, nll_weight, chunk
  slope = cotangents[0].astype(gradient.dtype)
  return gradient * slope, None, None, None, None


distribution_loss.defvjp(_distribution_forward, _distribution_backward)


def contrast(gists: jax.Array, margin: float) -> jax.Array:
  """Mean of max(0, cosine − margin) over pairs of gists [n, D]."""
  unit = gists / (jnp.linalg.norm(gists, axis=-1, keepdims=True) + 1e-6)
  cosine = unit @ unit.T
  n = gists.shape[0]
  off = 1.0 - jnp.eye(n, dtype=cosine.dtype)
  return jnp.sum(jax.nn.relu(cosine - margin) * off) / max(n * (n - 1), 1)


def _trunk(gists: jax.Array, stride: int, sink: jax.Array | None = None):
  """Embeddings [S, D] and positions [S] of gists [n, D] after a raw sink."""
  offset = 0 if sink is None else sink.shape[0]
  places = offset + (
    jnp.arange(gists.shape[0], dtype=jnp.int32) * stride + stride // 2)
  if sink is None:
    return gists, places
  return (jnp.concatenate([sink, gists]),
          jnp.concatenate([jnp.arange(offset, dtype=jnp.int32), places]))


def decode_trunk(base_params, base_config, trunk, places, remat: str = "none",
                 gists: jax.Array | None = None
                 ) -> tuple[jax.Array, jax.Array]:
  """Rotated keys and values [L, K, S, H] of a trunk [S, D], read causally.

  `gists` [S] bool says which of it are gists; all by default.
  """
  if gists is None:
    gists = jnp.ones(places.shape, bool)
  _, keys, values = model.forward(
    base_params, base_config, trunk, places, remat=remat, gists=gists)
  return rotation.rotate_keys(base_config, keys, places), values


def gist_segment(base_params, base_config, gists: jax.Array, stride: int,
                 remat: str = "none") -> tuple[model.Segment, int]:
  """Decodes gists [n, D]: what queries attend to, and the position after."""
  trunk, places = _trunk(gists, stride)
  keys, values = decode_trunk(base_params, base_config, trunk, places, remat)
  segment = model.Segment(
    keys, values, places, jnp.ones(places.shape, bool), rotated=True)
  return segment, gists.shape[0] * stride


class Layout(NamedTuple):
  """Where every segment's tokens and gists are, for the student.

  Attributes:
    trunk: [S, D] embeddings of the sink and the gists.
    trunk_places: [S] int32 their positions.
    gists: [S] bool, which of them are gists.
    places: [segments, near + segment] int32 positions of own tokens.
    visible: [segments, S] entries of the trunk that a segment sees.
  """

  trunk: jax.Array
  trunk_places: jax.Array
  gists: jax.Array
  places: jax.Array
  visible: jax.Array


def layout(base_params, o: Objective, ids, gists) -> Layout:
  """Places gists [blocks, m, D], and every segment after its own."""
  m = gists.shape[1]
  sink = None
  if o.sink:
    sink = embed(base_params, o, ids[:BRANCHING])
  flat = gists[1 if o.sink else 0 :].reshape(-1, gists.shape[-1])
  flat = flat.astype(o.activations)
  trunk, trunk_places = _trunk(flat, o.gist_stride, sink)
  lead = BRANCHING if o.sink else 0
  gone = (np.asarray(o.starts) - o.near - lead) // BRANCHING * m
  own = np.arange(o.near + o.segment)
  places = (lead + gone * o.gist_stride)[:, None] + own[None]
  visible = np.arange(trunk.shape[0])[None] < (lead + gone)[:, None]
  return Layout(trunk, trunk_places, jnp.arange(len(trunk)) >= lead,
                jnp.asarray(places, jnp.int32), jnp.asarray(visible))


def _student(base_params, base_config, o: Objective, ids, seen: Layout, rows):
  """Final hidden states [rows, segment, D] of the scored tokens.

  `rows` [n] int32 are the segments that are run. Returns the trunk's rotated
  keys and its values besides.
  """
  hidden, keys, values = model.forward_branches(
    base_params, base_config, seen.trunk, seen.trunk_places,
    embed(base_params, o, ids[jnp.asarray(o.index)[rows]]),
    seen.places[rows], seen.visible[rows], o.remat, seen.gists)
  return hidden[:, o.near :], keys, values


def _distributions(base_params, base_config, o: Objective, ids, seen, teacher,
                   weights, key):
  """`distribution_loss` of all segments, or of `kl_segments` random ones.

  Returns the trunk's rotated keys and its values besides.
  """
  rows = jnp.arange(len(o.starts), dtype=jnp.int32)
  if o.kl_segments is not None:
    rows = jax.random.choice(key, rows, (o.kl_segments,), replace=False)
  index = jnp.asarray(o.index[:, o.near :], jnp.int32)[rows].reshape(-1)
  student, keys, values = _student(
    base_params, base_config, o, ids, seen, rows)
  weights = weights[rows].reshape(-1)
  known = (index + 1 < o.window).astype(jnp.float32)  # a next token is known
  loss, sums = distribution_loss(
    student.reshape(-1, student.shape[-1]), base_params, teacher[index],
    ids[jnp.minimum(index + 1, o.window - 1)],
    weights * known / jnp.sum(weights * known), o.kl, o.nll, o.chunk)
  return loss, sums, keys, values


def _rebuild(base_params, base_config, o: Objective, ids, gists, key):
  """NLL per token of blocks repeated by the decoder after their gist."""
  blocks = ids.reshape(-1, BRANCHING)
  chosen = jax.random.choice(
    key, blocks.shape[0], (o.rebuild_blocks,), replace=False)
  targets, own = blocks[chosen], gists[chosen]
  before = embed(base_params, o, targets[:, :-1])
  x = jnp.concatenate([own.astype(before.dtype), before], axis=1)
  places = jnp.arange(x.shape[1], dtype=jnp.int32)
  hidden = jax.vmap(lambda x: model.forward(
    base_params, base_config, x, places, remat=o.remat,
    gists=places < own.shape[1])[0])(x)
  hidden = hidden[:, own.shape[1] - 1 :].reshape(-1, x.shape[-1])
  flat = targets.reshape(-1)
  nll = jax.checkpoint(
    lambda h: jnp.mean(model.token_nll(base_params, h, flat)))
  return nll(hidden)


def window_loss(gist_params, gist_config: gistnet.GistNetConfig, base_params,
                base_config: model.DecoderConfig, o: Objective,
                ids: jax.Array, key: jax.Array):
  """Loss of one window of token ids [window]; differentiable in gist_params.

  Returns:
    loss [] and a dictionary of [] float32 metrics: the terms, `nll` and
    `teacher_nll` in nats per token, and `norm`, the mean norm of a gist over
    that of a token's embedding.
  """
  ids = ids.astype(jnp.int32)
  features = gistnet.token_features(
    base_params, base_config, ids.reshape(-1, BRANCHING),
    gist_config.input_layer)
  gists = gistnet.apply(gist_params, gist_config, features, 1)
  reader = adapters.with_adapter(base_params, gist_params)

  seen = layout(base_params, o, ids, gists)
  x = embed(base_params, o, ids)
  rows = None
  if o.attend:
    teacher, rows = jax.lax.stop_gradient(
      attention_match.trace(base_params, base_config, x))
  else:
    teacher, _, _ = jax.lax.stop_gradient(model.forward(
      base_params, base_config, x, jnp.arange(o.window, dtype=jnp.int32),
      remat=o.remat))

  bias = 1.0 + o.early * 2.0 ** (-np.arange(o.segment) / 8)
  weights = np.tile(bias, (len(o.starts), 1))
  weights = jnp.asarray(weights / weights.sum(), jnp.float32)
  metrics, loss = {}, jnp.float32(0)
  if o.kl or o.nll:
    value, sums, far_keys, far_values = _distributions(
      reader, base_config, o, ids, seen, teacher, weights, key)
    loss += value
    metrics |= {"kl": sums[0], "nll": sums[1], "teacher_nll": sums[2]}
  else:
    far_keys, far_values = decode_trunk(
      reader, base_config, seen.trunk, seen.trunk_places, o.remat, seen.gists)
  if rows is not None:
    mask = (np.arange(o.near + o.segment) >= o.near).astype(np.float32)
    full = jnp.pad(weights, ((0, 0), (o.near, 0))) * mask[None]
    attend = attention_match.loss(
      base_params, base_config, rows, far_keys, far_values,
      jnp.asarray(o.index), seen.places, seen.visible, full)
    loss += o.attend * attend
    metrics["attend"] = attend
  spread = contrast(gists.reshape(-1, gists.shape[-1]), o.margin)
  loss += o.contrast * spread
  metrics["contrast"] = spread
  if o.rebuild:
    rebuild = _rebuild(reader, base_config, o, ids, gists, key)
    loss += o.rebuild * rebuild
    metrics["rebuild"] = rebuild
  lengths = [jnp.mean(jnp.linalg.norm(a.astype(jnp.float32), axis=-1))
             for a in (gists, x)]
  metrics |= {"norm": lengths[0] / lengths[1], "loss": loss}
  return loss, metrics
