"""What of a report must be the same in every run with the same seed."""

from mcjax.evaluation.report.writer import Figure, Report


def untimed(report: Report) -> dict[str, Figure]:
  """The figures by name, but for seconds."""
  return {k: v for k, v in report.figures.items() if v.unit != "s"}
