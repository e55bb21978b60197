"""GistNet for SmolLM2-135M on a CPU.

Command:
  tools/prepare_data
  python -m experiments.train_gistnet --config=experiments/configs/gistnet.py \
    --workdir=RUN --export=mcjax/pretrained/smollm2-135m/gistnet.safetensors
"""

import ml_collections

from mcjax.cli import configs
from mcjax.gist.network import GistNetConfig
from mcjax.training.gist.losses import Objective
from mcjax.training.gist.trainer import TrainConfig


def get_config(steps="3000"):
  """The run; see `TrainConfig`, `Objective` and `GistNetConfig` for fields.

  A field of `gistnet` that is None is as the base asks for it, or as in the
  weights of `initial`. A turn of a phase says what differs from `objective`.

  `--config=experiments/configs/gistnet.py:900` runs 900 steps. A run may be
  resumed with another number: the last 40 % of the steps anneal the rate.

  The curriculum: gists directly before the scored text; then, in turn, these
  again, gists behind an attention sink and before 64 recent tokens, as the
  loop shows them, and one gist of gists for 1,024 tokens.
  """
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "bfloat16"  # of the frozen base; all else stays float32
  c.data = ""
  c.initial = ""
  c.mixture = dict(prose=1.0, docs=1.0, wiki=1.0, code=1.0, chat=0.5)
  c.kinds = ()  # instead of mixture: --config.kinds=notes:2,prose
  c.gistnet = configs.unset(GistNetConfig, without=("d_model", "base_shape"))
  c.objective = configs.defaults(Objective)
  first = int(steps) // 2
  loop = dict(sink=True, near=64, kl_segments=6)
  upper = dict(level=2, window=1088, segment=64, kl_segments=1, nll=0.2)
  c.phases = [
    dict(steps=first, turns=[{}]),
    dict(steps=int(steps) - first, turns=[{}, loop, {}, {}, upper, {}])]
  c.train = configs.defaults(
    TrainConfig, without=("phases",), batch=4, micro_batch=2, optimizer="muon",
    learning_rate=2e-3, warmup=10, decay_fraction=0.4, save_every=20)
  return c
