"""The server over SmolLM2-135M, for this machine alone.

  python -m experiments.serve --config=serve --config.root=runs/histories
"""

from ml_collections import config_dict

from experiments.configs import run


def get_config(base: str = "smollm2-135m") -> config_dict.ConfigDict:
  """As `run.py`, and what a server needs; `serve:NAME` takes another base."""
  c = run.get_config(base)
  del c.max_new_tokens  # a request says
  c.host = "127.0.0.1"  # elsewhere MCJAX_API_KEY must be set
  c.port = 8080
  c.root = "runs/histories"  # a folder for every history
  c.slots = 16  # histories open at one time
  c.splices = 0  # prompts run together; 0 is 1 on CPUs and 8 elsewhere
  c.mesh_data = 1  # devices that histories are split over; -1 takes all left
  c.mesh_fsdp = 1  # the same, and the base's parameters besides
  c.mesh_tensor = 1  # devices that attention heads are split over
  c.limits = config_dict.ConfigDict({
    "body_bytes": 32 << 20,  # of a request
    "max_new_tokens": 1024,  # of an answer
    "at_once": 128,  # requests at work or waiting
    "requests_per_minute": 0,  # of one client; 0 is any number
    "wait_seconds": 600.0,  # for a free slot
  })
  return c
