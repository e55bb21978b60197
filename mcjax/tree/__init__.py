"""The history on disk: a 32-ary tree of token ids, gists and keys."""
