"""The text that GistNet and LensNet learn from and are measured on.

Command, a few minutes:
  python -m experiments.prepare_data
Your own text, seconds:
  python -m experiments.prepare_data --config.text=notes/ --config.folder=STORE
"""

from ml_collections import config_dict


def get_config():
  """What is fetched, and where it goes."""
  c = config_dict.ConfigDict()
  c.base = "smollm2-135m"  # whose tokenizer
  c.folder = ""  # the user's cache
  c.text = ()  # your own files and folders instead of what is fetched
  c.suffixes = ()  # in folders only files that end so
  c.field = "text"  # of a row of .jsonl and .parquet files
  c.books = "../shared/data/public-domain-books.jsonl.xz"  # JSON lines
  c.million_tokens = config_dict.placeholder(float)  # a kind; 3, or all if full
  c.full = False  # all packages
  c.kinds = ()  # only these kinds of text
  return c
