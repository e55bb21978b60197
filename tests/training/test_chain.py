"""The documented way from a base and some files to an answer, as it stands.

On bases that the project has never seen: random ones of two families, written
as Hugging Face folders with tokenizers of their own.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import mcjax
from mcjax.testing import tiny_models

_ROOT = pathlib.Path(__file__).parents[2]
_DOCUMENT = _ROOT / "docs" / "training.md"
_FEWER = {"gistnet_tiny": "gistnet_tiny:2", "lensnet_tiny": "lensnet_tiny:2",
          "alternate_tiny": "alternate_tiny:2", "keys_tiny": "keys_tiny:2"}
_SIZES = dict(hidden_size=64, intermediate_size=96, vocab_size=600,
              max_position_embeddings=4096)


def documented() -> list[str]:
  """The lines of the first block of commands, with few steps."""
  text = _DOCUMENT.read_text(encoding="utf-8")
  block = re.search(r"```\n(BASE=.*?)```", text, re.DOTALL)
  assert block
  lines = block[1].replace("\\\n", "").splitlines()[1:]
  return [re.sub(r"(?<=--config=)(\w+_tiny)", lambda m: _FEWER[m[1]], line)
          for line in lines]


def _server() -> str:
  """The documented command that serves one's own weights."""
  text = _DOCUMENT.read_text(encoding="utf-8")
  block = re.search(r"```\n(python -m experiments.serve .*?)```", text,
                    re.DOTALL)
  assert block
  return block[1].replace("\\\n", "").strip()


def _reply(request: urllib.request.Request):
  """What comes back, once the server listens, just after it says so."""
  for _ in range(600):
    try:
      return urllib.request.urlopen(request, timeout=600)
    except urllib.error.HTTPError as error:
      pytest.fail(error.read().decode())
    except urllib.error.URLError:
      time.sleep(0.1)
  pytest.fail("the server does not listen")


def _answer_of_a_server(cwd, environment) -> dict:
  """What it says to one question; it ends on SIGTERM."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  server = subprocess.Popen(
    ["bash", "-c", f"exec {_server()} --config.port={port}"], cwd=cwd,
    env=environment, stderr=subprocess.PIPE, text=True)
  assert server.stderr is not None
  try:
    said = [""]
    while not said[-1].startswith("Serving"):
      said.append(server.stderr.readline())
      assert said[-1], said
    request = urllib.request.Request(
      f"http://127.0.0.1:{port}/v1/chat/completions",
      json.dumps({"model": "own", "max_tokens": 8, "messages": [
        {"role": "user", "content": "What did I decide?"}]}).encode(),
      {"Content-Type": "application/json"})
    answer = json.load(_reply(request))
    server.send_signal(signal.SIGTERM)
    said.append(server.communicate(timeout=300)[1])
    assert server.returncode == 0, said
    return answer
  finally:
    server.kill()
    server.communicate()


def test_every_step_is_documented():
  programs = [line.split()[2].removeprefix("experiments.")
              for line in documented()]
  assert programs == ["prepare_data", "train_gistnet", "train_lensnet",
                      "train_keys", "alternate", "evaluate", "run"]
  assert "--config.gistnet=" in _server() and "--config.lensnet=" in _server()


def _tokenizer(files: list[str]) -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer of 600 entries, learned from the files."""
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.train(files, trainers.BpeTrainer(
    vocab_size=600, special_tokens=["<|end|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return core


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_an_unseen_base_is_taken_all_the_way(family, tmp_path):
  notes = tmp_path / "notes"
  notes.mkdir()
  for name in ("storage", "trials"):
    text = (_ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    (notes / f"{name}.md").write_text(text[:12000], encoding="utf-8")
  base = tmp_path / "never-seen"
  config = {**tiny_models.CONFIGS[family], **_SIZES}
  tiny_models.write_folder(base, config, tiny_models.weights(config))
  _tokenizer([str(p) for p in notes.iterdir()]).save(
    str(base / "tokenizer.json"))
  (base / "tokenizer_config.json").write_text(json.dumps(
    {"eos_token": "<|end|>"}))
  runs = tmp_path / "runs"
  environment = {
    **os.environ, "BASE": str(base), "RUNS": str(runs),
    "PYTHONPATH": str(_ROOT), "PATH": os.pathsep.join(
      [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])}
  environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "").replace(
    "device_count=8", "device_count=1")
  for line in documented():
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, (line, done.stderr)
  answer = _answer_of_a_server(tmp_path, environment)
  assert answer["usage"]["completion_tokens"] > 0
  assert (runs / "evaluation" / "results.json").exists()
  assert (runs / "alternate" / "results.md").exists()
  lm = mcjax.load_base_lm(base)
  gistnet = mcjax.load_gistnet(lm, runs / "gistnet.safetensors")
  lensnet = mcjax.load_lensnet(
    lm, runs / "lensnet.safetensors", gistnet=gistnet)
  assert gistnet.trained and lensnet.by_meaning and lensnet.reads(gistnet)
  assert gistnet.encode(np.zeros((1, 32), np.int32)).shape == (1, 1, 64)
  loaded = mcjax.load_lensnet(lm, runs / "lensnet.safetensors")
  assert loaded.config == lensnet.config
