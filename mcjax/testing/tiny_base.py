"""A tiny random base LM with a byte tokenizer, and how to run it plainly."""

import dataclasses
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mcjax.base.decoder_config import DecoderConfig
from mcjax.base.load import BaseLM
from mcjax.base.tokenizer import Tokenizer
from mcjax.gist import lora
from mcjax.gist.encoder import GistEncoder
from mcjax.gist.weights import default_config, init_params
from mcjax.tree.tree import MegaContextTree

VOCAB = 300
SPECIALS = ("<|bos|>", "<|turn|>", "<|stop|>")
BOS, TURN, STOP = 256, 257, 258
CHAT = (
  "{% for m in messages %}{{ '<|turn|>' + m['role'] + ': ' + m['content']"
  " + '<|stop|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|turn|>assistant: ' }}{% endif %}"
)


def memory_url() -> str:
  """A new place in memory."""
  return f"memory://{uuid.uuid4()}/tree"


def byte_tokenizer(*, stops: bool = False, chat: bool = False) -> Tokenizer:
  """One token a byte; stop tokens and a chat template if asked for."""
  names = sorted(pre_tokenizers.ByteLevel.alphabet())
  core = tokenizers.Tokenizer(
    models.BPE(vocab={t: i for i, t in enumerate(names)}, merges=[])
  )
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens(
    [tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIALS]
  )
  return Tokenizer(
    core,
    bos_id=None if chat else BOS,
    stop_ids=[STOP] if stops or chat else [],
    template=CHAT if chat else None,
  )


def make_lm(
  seed: int = 0, *, name: str = "tiny", max_positions: int = 2048,
  vocab: int = VOCAB, **tokenizer
) -> BaseLM:
  """Two layers of 32 channels with seeded float32 weights."""
  rng = np.random.RandomState(seed)
  config = DecoderConfig(
    family="llama", vocab_size=vocab, d_model=32, n_layers=2, n_heads=4,
    n_kv_heads=2, head_dim=8, d_ff=48, max_positions=max_positions,
    rope_theta=1e4, rms_norm_eps=1e-5, tie_embeddings=False,
  )

  def draw(*shape, scale=0.3):
    return jnp.asarray(scale * rng.standard_normal(shape).astype(np.float32))

  ones = jnp.ones((2, 32), jnp.float32)
  params = {
    "embed": draw(vocab, 32, scale=1.0),
    "final_norm": ones[0],
    "unembed": draw(32, vocab),
    "layers": {
      "attn_norm": ones, "mlp_norm": ones, "wq": draw(2, 32, 4, 8),
      "wk": draw(2, 32, 2, 8), "wv": draw(2, 32, 2, 8),
      "wo": draw(2, 4, 8, 32), "w_gate": draw(2, 32, 48),
      "w_up": draw(2, 32, 48), "w_down": draw(2, 48, 32),
    },
  }
  return BaseLM(
    name, config, params, byte_tokenizer(**tokenizer), f"tiny-base-{seed}"
  )


def gistnet(lm: BaseLM, seed: int = 0, spread: float = 0.0) -> GistEncoder:
  """An untrained GistNet; `spread` moves it from the last-token start."""
  config = default_config(lm.params, lm.config)
  params = init_params(config, seed)
  rng = np.random.RandomState(seed)
  params = jax.tree.map(
    lambda a: np.asarray(a)
    + np.float32(spread) * rng.standard_normal(a.shape).astype(np.float32),
    params,
  )
  return GistEncoder(lm, params, config, trained=False)


def adapted(lm: BaseLM, seed: int = 0) -> BaseLM:
  """The same base, reading gists through a random adapter."""
  rng = np.random.RandomState(seed)
  layers, d = lm.config.n_layers, lm.config.d_model
  shapes = {"gain": (d,), "shift": (d,), "down": (d, 3), "up": (3, d)}
  adapter = {k: jnp.asarray(rng.normal(0, 0.3, (layers, *shape)), jnp.float32)
             for k, shape in shapes.items()}
  adapter["lora"] = jax.tree.map(
    lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32),
    lora.init(layers, d, lora.shape_of(lm.config), 2, jax.random.key(0)))
  return dataclasses.replace(lm, params={**lm.params, "gist_adapter": adapter})


def uniform(lm: BaseLM) -> BaseLM:
  """The same base with equal logits for every token."""
  flat = jnp.zeros_like(lm.params["unembed"])
  return dataclasses.replace(lm, params=lm.params | {"unembed": flat})


def text(tokens: int, seed: int = 0) -> str:
  """Lower-case words of as many bytes, one token each."""
  rng = np.random.RandomState(seed)
  letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), tokens)
  letters[rng.random_sample(tokens) < 0.18] = " "
  return "".join(letters)


# --- The decoder again, in NumPy and float64 ---------------------------------


def _norm(x, scale, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, positions, theta):
  """RoPE of x [T, heads, H], half-split convention.

  Angles are float32 as in every implementation: at position 2,000 a float64
  one differs by 1e-4.
  """
  half = x.shape[-1] // 2
  exponents = np.arange(half, dtype=np.float32) / np.float32(half)
  freqs = np.exp(np.float32(-np.log(theta)) * exponents)
  angle = positions.astype(np.float32)[:, None] * freqs
  angle = angle.astype(np.float64)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _low_rank(maps, name, x, rows):
  """What LoRA adds to a projection of x [T, width] at `rows` [T]."""
  if maps is None:
    return 0.0
  out = np.einsum("td,dr,r...->t...", x, maps[name]["a"], maps[name]["b"])
  mask = np.asarray(rows).reshape(-1, *[1] * (out.ndim - 1))
  return np.where(mask, out, 0.0)


def plain_logits(lm: BaseLM, x, positions, gists=None) -> np.ndarray:
  """Causal logits [T, V] of inputs [T, D] in order at given positions.

  Where `gists` [T] is true, the base's gist adapter is used, if it has one.
  """
  c = lm.config
  params = {k: np.asarray(v, np.float64) for k, v in lm.params.items()
            if k not in ("layers", "gist_adapter")}
  adapter = lm.params.get("gist_adapter")
  layers = {k: np.asarray(v, np.float64) for k, v in
            lm.params["layers"].items()}
  x, positions = np.asarray(x, np.float64), np.asarray(positions, np.float64)
  future = np.triu(np.ones((len(x), len(x)), bool), 1)
  group = c.n_heads // c.n_kv_heads
  for i in range(c.n_layers):
    w, own = {k: v[i] for k, v in layers.items()}, {}
    if adapter is not None and gists is not None:
      own = jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), adapter)
      read = x * (1 + own["gain"]) + own["shift"]
      if "down" in own:
        read = read + _norm(x, 1, 1e-6) @ own["down"] @ own["up"]
      x = np.where(np.asarray(gists)[:, None], read, x)
    y = _norm(x, w["attn_norm"], c.rms_norm_eps)
    maps = own.get("lora") if own and gists is not None else None
    q, k, v = (np.einsum("td,dnh->tnh", y, w[f"w{name}"])
               + _low_rank(maps, name, y, gists) for name in "qkv")
    local = i in c.local_layers
    theta = (c.local_rope_theta if local else None) or c.rope_theta
    q, k = _rotate(q, positions, theta), _rotate(k, positions, theta)
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(c.head_dim)
    behind = positions[:, None] - positions
    unseen = future | (local & (behind >= c.local_window))
    scores = np.where(unseen, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("nts,snh->tnh", weights, v)
    x = x + np.einsum("tnh,nhd->td", mixed, w["wo"]) + _low_rank(
      maps, "o", mixed.reshape(len(mixed), -1), gists)
    y = _norm(x, w["mlp_norm"], c.rms_norm_eps)
    gate = y @ w["w_gate"]
    gated = gate / (1 + np.exp(-gate)) * (y @ w["w_up"])
    x = x + gated @ w["w_down"]
  return _norm(x, params["final_norm"], c.rms_norm_eps) @ params["unembed"]


def log_softmax(logits) -> np.ndarray:
  """Over the last axis, float64."""
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def plain_nll(lm: BaseLM, token_ids) -> np.ndarray:
  """NLL [T] of tokens at positions 0..T-1; the first has none and is NaN."""
  x = np.asarray(lm.params["embed"])[np.asarray(token_ids)]
  logits = plain_logits(lm, x, np.arange(len(x)))
  out = np.full(len(x), np.nan)
  rows = np.arange(len(x) - 1)
  out[1:] = -log_softmax(logits)[rows, np.asarray(token_ids)[1:]]
  return out


def random_tree(encoder, tokens: int, seed: int) -> MegaContextTree:
  """A history of random bytes."""
  tree = MegaContextTree.create(
    memory_url(), base_fingerprint="tiny", base_name="tiny", encoder=encoder,
    vocab_size=VOCAB,
  )
  tree.append(np.random.RandomState(seed).randint(0, 256, tokens))
  return tree


def window_logits(context, tree) -> np.ndarray:
  """Logits [V] behind the window: its visible nodes, fetched from the tree.

  Args:
    context: the ContextLM; only its bookkeeping is looked at.
    tree: the history.
  """
  lm, e = context.lm, context.window.entries
  positions = context.window.positions(
    context.gist_stride, lm.config.max_positions
  )
  table = np.asarray(lm.params["embed"])
  shown = ((e.level == 0) | context.show_gists) & ~context.window.hidden()
  seen = np.flatnonzero(shown).tolist()
  x = []
  for k in seen:
    level, index = int(e.level[k]), int(e.index[k])
    if level == 0:
      x.append(table[tree.tokens(index, index + 1)[0]])
    else:
      x.append(tree.gists(level, index, index + 1)[0])
  return plain_logits(
    lm, np.stack(x), positions[seen], e.level[seen] > 0)[-1]
