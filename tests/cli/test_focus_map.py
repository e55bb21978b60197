"""The focus as text."""

from mcjax.cli.focus_map import Section, focus_map, source_lines
from mcjax.runtime.documents import Source
from mcjax.types import Entry


def raw(start, stop):
  return [Entry(0, i, i + 1) for i in range(start, stop)]


FOCUS = (
  raw(0, 32) + [Entry(1, i, i + 32) for i in range(32, 1024, 32)]
  + [Entry(2, 1024, 2048), Entry(2, 2048, 3072)]
  + [Entry(1, 3072, 3104)] + raw(3104, 3200)
)
SECTIONS = [
  Section("intro.py", 0, 64), Section("body.py", 64, 1024),
  Section("far.py", 1024, 2000), Section("farther.py", 2000, 3000),
  Section("late.py", 3000, 3150), Section("chat", 3150, 3200),
]


def lines(*args, **kwargs):
  return focus_map(FOCUS, SECTIONS, *args, **kwargs).splitlines()


def test_the_whole_map():
  got = lines(width=8)
  assert got[0] == (
    "  L0: 128 entries for 128 tokens  L1: 32 entries for 1,024 tokens"
    "  L2: 2 entries for 2,048 tokens"
  )
  shown = {line.split()[0]: line for line in got[1:-1]}
  assert list(shown) == ["chat", "late.py", "intro.py", "body.py"]
  assert shown["intro.py"].endswith("[00001111] L0 0-32")
  assert shown["body.py"].endswith("[11111111] ")
  assert shown["late.py"].endswith("[22211000] L0 104-150")
  assert shown["chat"].endswith("[00000000] L0 0-50")
  assert got[-1] == "  (2 only at L2 and coarser)"


def test_most_raw_tokens_come_first_and_the_rest_is_counted():
  got = lines(most=1)
  assert len(got) == 3 and got[1].split()[0] == "chat"
  assert got[2] == "  (3 more in part at L1; 2 only at L2 and coarser)"


def test_many_runs_are_cut():
  focus = []
  for i in range(6):
    focus += raw(64 * i, 64 * i + 32) + [Entry(1, 64 * i + 32, 64 * i + 64)]
  line = focus_map(focus, [Section("x", 0, 384)]).splitlines()[1]
  assert line.endswith("L0 0-32, 64-96, 128-160, 192-224 +2")


def test_nothing_to_show():
  text = focus_map([], [Section("x", 0, 10), Section("empty", 3, 3)])
  assert text.strip() == ""


def test_passages_are_named_and_on_one_line_each():
  got = source_lines([
    Source("a.md", 5, 9, "tokens 5\n to 9 ", 0.5),
    Source(None, 900, 901, "said", 1.0)])
  assert [line.split() for line in got.splitlines()] == [
    ["a.md", "0.50", "tokens", "5", "to", "9"],
    ["(conversation)", "1.00", "said"]]
  assert source_lines([]) == "  all raw text of the window"


def test_a_long_name_is_cut_with_a_mark():
  line = source_lines([Source("/home/ada/notes/of/the/club/minutes.md", 5, 9,
                              "x", 0.5)])
  assert line.split()[0] == "…otes/of/the/club/minutes.md"
