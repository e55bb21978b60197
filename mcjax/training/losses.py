"""What GistNet is trained on: a frozen decoder that sees only gists far away.

One window of text gives every signal at once. The teacher reads the window in
full. The student decodes the gists as a sequence, then every segment of the
window again, seeing its own tokens and the gists of all blocks before it; so
each token is a sample, at about the cost of one more pass over the window.

  kl        teacher's next-token distribution against the student's
  match     the student's keys and values against the teacher's, every layer
  rebuild   the decoder repeats a block's tokens after reading its gist
  contrast  cosine similarity of a window's gists above a margin

Token p + 1 is always scored from position p, and only from raw tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import gistnet
from mcjax.base import model
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
    kl, match, contrast, rebuild: weights of the terms.
    nll: weight of plain next-token loss beside the KL.
    margin: cosine similarity that the contrastive term tolerates.
    rebuild_blocks: blocks of every window that are repeated from their gists.
    early: extra weight of a segment's first tokens, halved every 8 tokens.
    match_layers: match only the first so many layers, and run no others if
      `kl`, `nll` and `rebuild` are 0; None means all.
    chunk: tokens whose logits exist at one time.
    remat: recompute the decoder's layers in the backward pass.
  """

  window: int = 512
  segment: int = 32
  near: int = 0
  sink: bool = False
  gist_stride: int = 1
  kl: float = 1.0
  nll: float = 0.0
  match: float = 0.0
  contrast: float = 0.05
  rebuild: float = 0.0
  margin: float = 0.2
  rebuild_blocks: int = 2
  early: float = 0.0
  match_layers: int | None = None
  chunk: int = 256
  remat: bool = False

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
    if not self.starts:
      raise McjaxError("Objective.window leaves no segment with a gist to see: "
                       "lengthen it or shorten near and segment")

  @property
  def starts(self) -> tuple[int, ...]:
    """First scored position of every segment that sees a gist."""
    first = self.near + BRANCHING * (2 if self.sink else 1)
    return tuple(range(first, self.window - self.segment + 1, self.segment))

  @property
  def shallow(self) -> bool:
    """Whether only the decoder's first `match_layers` run."""
    return self.match_layers is not None and not (
      self.kl or self.nll or self.rebuild)


def first_layers(base_params, base_config: model.DecoderConfig, layers: int):
  """The decoder cut after `layers` layers: (params, config)."""
  cut = jax.tree.map(lambda a: a[:layers], base_params["layers"])
  return (base_params | {"layers": cut},
          dataclasses.replace(base_config, n_layers=layers))


def _chunked(chunk: int, *arrays):
  """Splits axis 0 into chunks, the last one padded with zeros."""
  size = min(chunk, arrays[0].shape[0])
  pad = -arrays[0].shape[0] % size
  return tuple(
    jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(
      (-1, size) + a.shape[1:]) for a in arrays)


def _kl_chunk(base_params, nll_weight, teacher, student, targets, weights):
  """Weighted KL, NLL sums of a chunk and the gradient for `student`."""
  wanted = jax.nn.log_softmax(model.unembed(base_params, teacher), axis=-1)
  found = jax.nn.log_softmax(model.unembed(base_params, student), axis=-1)
  p, q = jnp.exp(wanted), jnp.exp(found)
  kl = jnp.sum(p * (wanted - found), axis=-1)
  picked = jax.nn.one_hot(targets, found.shape[-1], dtype=jnp.float32)
  nll = -jnp.sum(picked * found, axis=-1)
  teacher_nll = -jnp.sum(picked * wanted, axis=-1)
  slope = (q - p) + nll_weight * (q - picked)
  slope = (slope * weights[:, None]).astype(student.dtype)
  if "unembed" in base_params:
    gradient = jnp.einsum("tv,dv->td", slope, base_params["unembed"])
  else:
    gradient = jnp.einsum("tv,vd->td", slope, base_params["embed"])
  sums = jnp.stack([jnp.sum(x * weights) for x in (kl, nll, teacher_nll)])
  return sums, gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def distribution_loss(student, base_params, teacher, targets, weights,
                      nll_weight: float, chunk: int):
  """Weighted sums of KL(teacher ‖ student) and NLL; logits never held whole.

  The gradient is computed in the same pass as the value, chunk by chunk, so
  that the vocabulary is multiplied only three times and nothing is stored.

  Args:
    student: [T, D] the student's final hidden states.
    base_params: the frozen decoder's parameters.
    teacher: [T, D] the teacher's final hidden states.
    targets: [T] int32 next tokens.
    weights: [T] float32.
    nll_weight: weight of the NLL in the loss.
    chunk: positions per chunk.

  Returns:
    (loss [], sums [3]) where loss = KL + nll_weight * NLL, weighted sums, and
    sums are (KL, student NLL, teacher NLL) in nats.
  """
  return _distribution_forward(student, base_params, teacher, targets, weights,
                               nll_weight, chunk)[0]


def _distribution_forward(student, base_params, teacher, targets, weights,
                          nll_weight, chunk):
  def step(total, piece):
    sums, gradient = _kl_chunk(base_params, np.float32(nll_weight), *piece)
    return total + sums, gradient

  pieces = _chunked(chunk, teacher, student, targets, weights)
  sums, gradients = jax.lax.scan(step, jnp.zeros((3,), jnp.float32), pieces)
  gradient = gradients.reshape((-1, student.shape[-1]))[: student.shape[0]]
  loss = sums[0] + np.float32(nll_weight) * sums[1]
  return (loss, sums), gradient


def _distribution_backward(nll_weight, chunk, gradient, cotangents):
  del nll_weight, chunk
  slope = cotangents[0].astype(gradient.dtype)
  return gradient * slope, None, None, None, None


distribution_loss.defvjp(_distribution_forward, _distribution_backward)


def relative_error(found: jax.Array, wanted: jax.Array,
                   weights: jax.Array) -> jax.Array:
  """Mean over layers of squared error / variance: [L, K, T, H] pairs → []."""
  found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
  w = weights[None, None, :, None]
  total = jnp.sum(w) + 1e-6
  centre = jnp.sum(wanted * w, axis=2, keepdims=True) / total
  error = jnp.sum(jnp.square(found - wanted) * w, axis=(1, 2, 3))
  spread = jnp.sum(jnp.square(wanted - centre) * w, axis=(1, 2, 3))
  return jnp.mean(error / (spread + 1e-6))


def contrast(gists: jax.Array, margin: float) -> jax.Array:
  """Mean of max(0, cosine − margin) over pairs of gists [n, D]."""
  unit = gists / (jnp.linalg.norm(gists, axis=-1, keepdims=True) + 1e-6)
  cosine = unit @ unit.T
  n = gists.shape[0]
  off = 1.0 - jnp.eye(n, dtype=cosine.dtype)
  return jnp.sum(jax.nn.relu(cosine - margin) * off) / max(n * (n - 1), 1)


def gist_segment(base_params, base_config, gists: jax.Array, stride: int,
                 sink: jax.Array | None = None, remat: bool = False):
  """Decodes gists [n, D] (after raw sink embeddings [s, D]) as a sequence.

  Returns:
    a `model.Segment` of s + n entries, and the position after the last.
  """
  offset = 0 if sink is None else sink.shape[0]
  n = gists.shape[0]
  places = offset + jnp.arange(n, dtype=jnp.int32) * stride + stride // 2
  x = gists.astype(base_params["embed"].dtype)
  if sink is not None:
    x = jnp.concatenate([sink.astype(x.dtype), x])
    places = jnp.concatenate([jnp.arange(offset, dtype=jnp.int32), places])
  _, keys, values = model.forward(
    base_params, base_config, x, places, remat=remat)
  rotated = model.rotate_keys(base_config, keys, places)
  segment = model.Segment(
    rotated, values, places, jnp.ones(places.shape, bool), rotated=True)
  return segment, offset + n * stride


def _student(base_params, base_config, o: Objective, ids, gists):
  """Runs all segments; returns hidden [S, H, D], keys, values [S, L, K, H, h]."""
  m = gists.shape[1]
  sink = model.embed(base_params, ids[:BRANCHING]) if o.sink else None
  flat = gists[1 if o.sink else 0 :].reshape(-1, gists.shape[-1])
  far, _ = gist_segment(
    base_params, base_config, flat, o.gist_stride, sink, o.remat)
  lead = BRANCHING if o.sink else 0
  starts = np.asarray(o.starts)
  gone = (starts - o.near - lead) // BRANCHING * m  # gists each segment sees
  reach = o.near + o.segment
  index = (starts - o.near)[:, None] + np.arange(reach)[None]
  places = (lead + gone * o.gist_stride)[:, None] + np.arange(reach)[None]
  visible = np.arange(far.positions.shape[0])[None] < (lead + gone)[:, None]
  x = model.embed(base_params, ids[index])

  def one(x, places, visible):
    return model.forward(
      base_params, base_config, x, places, (far._replace(visible=visible),),
      remat=o.remat)

  hidden, keys, values = jax.vmap(one)(
    x, jnp.asarray(places, jnp.int32), jnp.asarray(visible))
  scored = slice(o.near, None)
  return hidden[:, scored], keys[:, :, :, scored], values[:, :, :, scored]


def _rebuild(base_params, base_config, o: Objective, ids, gists, key):
  """NLL per token of blocks repeated by the decoder after their gist."""
  blocks = ids.reshape(-1, BRANCHING)
  chosen = jax.random.choice(
    key, blocks.shape[0], (o.rebuild_blocks,), replace=False)
  targets, own = blocks[chosen], gists[chosen]
  before = model.embed(base_params, targets[:, :-1])
  x = jnp.concatenate([own.astype(before.dtype), before], axis=1)
  places = jnp.arange(x.shape[1], dtype=jnp.int32)
  hidden = jax.vmap(lambda x: model.forward(
    base_params, base_config, x, places, remat=o.remat)[0])(x)
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
    `teacher_nll` in nats per token, `norm` (mean gist norm over mean
    embedding norm) and `scale`.
  """
  if o.shallow:
    base_params, base_config = first_layers(
      base_params, base_config, o.match_layers)
  ids = ids.astype(jnp.int32)
  features = gistnet.token_features(
    base_params, base_config, ids.reshape(-1, BRANCHING),
    gist_config.input_layer)
  gists = gistnet.apply(gist_params, gist_config, features, 1)

  x = model.embed(base_params, ids)
  teacher, keys, values = jax.lax.stop_gradient(model.forward(
    base_params, base_config, x, jnp.arange(o.window, dtype=jnp.int32)))
  hidden, own_keys, own_values = _student(
    base_params, base_config, o, ids, gists)

  index = np.asarray(o.starts)[:, None] + np.arange(o.segment)[None]
  weights = 1.0 + o.early * 2.0 ** (-np.arange(o.segment) / 8)
  weights = np.broadcast_to(weights / weights.mean(), index.shape).reshape(-1)
  index = index.reshape(-1)
  weights = jnp.asarray(weights / weights.sum(), jnp.float32)
  metrics, loss = {}, jnp.float32(0)
  if not o.shallow:
    last = index[-1] == o.window - 1  # no next token there; KL needs none
    targets = ids[np.minimum(index + 1, o.window - 1)]
    value, sums = distribution_loss(
      hidden.reshape(-1, hidden.shape[-1]), base_params, teacher[index],
      targets, weights.at[-1].set(0.0) if last else weights, o.nll, o.chunk)
    loss += o.kl * value
    metrics |= {"kl": sums[0], "nll": sums[1], "teacher_nll": sums[2]}
  if o.match:
    def flat(a):
      return jnp.moveaxis(a, 0, 2).reshape(
        a.shape[1], a.shape[2], -1, a.shape[4])

    n = o.match_layers
    pairs = [(flat(own_keys)[:n], keys[:n][:, :, index]),
             (flat(own_values)[:n], values[:n][:, :, index])]
    match = sum(relative_error(a, b, weights) for a, b in pairs) / 2
    loss += o.match * match
    metrics["match"] = match
  spread = contrast(gists.reshape(-1, gists.shape[-1]), o.margin)
  loss += o.contrast * spread
  metrics["contrast"] = spread
  if o.rebuild:
    rebuild = _rebuild(base_params, base_config, o, ids, gists, key)
    loss += o.rebuild * rebuild
    metrics["rebuild"] = rebuild
  lengths = [jnp.mean(jnp.linalg.norm(a.astype(jnp.float32), axis=-1))
             for a in (gists, x)]
  metrics |= {"norm": lengths[0] / lengths[1], "loss": loss}
  return loss, metrics
