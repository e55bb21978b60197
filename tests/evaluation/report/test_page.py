"""The page of a report: whole in one file, and shown by a browser."""

import json

from browser import needs_browser, opened
import pytest

from mcjax.evaluation.report import charts, page
from mcjax.evaluation.report.writer import Report, Table


@pytest.fixture
def folder(tmp_path):
  """A report with everything that a page can show."""
  out = Report("needle", {"window": 512})
  out.add("text", "a </script><b> c")
  out.add("missing", float("nan"), "s")
  out.add_interval("accuracy", 0.5, 0.25, 0.75, "share", n=8)
  out.tables.append(Table("Rates", ("arm", "rate"), [
    ["plain", 12.5], ["loop", None], ["fast", "1,200 [1,100, 1,300]"]]))
  out.notes.append("A note.")
  out.charts += [
    charts.Chart("NLL by window", "window", "nats", {
      "raw": ([256, 512], [3.0, 2.5]), "gists": ([256, 512], [2.9, None])},
      log_x=True, log_y=True),
    charts.Chart("Constant", "policy", "share", {"a": (["x", "y"], [1, 1])})]
  out.heat_maps.append(charts.HeatMap(
    "Accuracy", "depth", "length", ["0", "1/2"], ["4k", "32k"],
    [[1.0, 0.5], [0.0, None]]))
  return out.write(tmp_path / "out")


def test_figures_have_n_and_interval(folder):
  figures = json.loads((folder / "results.json").read_text())["figures"]
  assert figures["accuracy"] == {
    "value": 0.5, "unit": "share", "n": 8, "interval": [0.25, 0.75]}
  assert figures["accuracy/low"] == {"value": 0.25, "unit": "share"}


def test_plots_are_drawn(folder):
  pytest.importorskip("matplotlib")
  assert {p.name for p in folder.glob("*.png")} == {
    "nll-by-window.png", "constant.png", "accuracy.png"}


def test_the_page_needs_nothing_else(folder):
  text = (folder / "report.html").read_text()
  assert "src=" not in text and "<link" not in text
  assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_data_cannot_end_its_script(tmp_path):
  template = tmp_path / "t.html"
  template.write_text("<title>{{title}}</title><script>{{data}}</script>")
  text = page.fill(template, "a<b", {"x": "</script><!-- {{title}}"})
  assert text.startswith("<title>a&lt;b</title>")
  assert text.count("</script>") == 1 and "<!--" not in text
  with pytest.raises(ValueError):
    page.fill(template, "", {"x": float("nan")})


@needs_browser
def test_a_browser_shows_it(folder, tmp_path):
  document, complaints = opened(folder / "report.html", tmp_path)
  assert not complaints
  assert document.count("<svg") == 2 and document.count("<polyline") == 3
  assert document.count("background:hsl(") == 4  # three cells, and the script
  rows = '[...document.querySelectorAll("tbody")[0].rows]'
  document, complaints = opened(folder / "report.html", tmp_path, f"""
    for (let i = 0; i < 2; i++) {{
      document.querySelectorAll("th")[1].click();
      document.body.append("sorted: " +
        {rows}.map(r => r.cells[0].textContent).join());
    }}""")
  assert "sorted: fast,plain,loop" in document
  assert "sorted: loop,plain,fast" in document and not complaints
  for told in ("a &lt;/script&gt;", "A note.", "0.25 … 0.75", "1,200 [1,100"):
    assert told in document
