"""Predictions -> the report folder."""

from __future__ import annotations

from pathlib import Path

from cmrhpc import seal
from cmrhpc.planning import REPORT
from cmrhpc.report.aggregate import AggregateResult, aggregate
from cmrhpc.workspace import Judge, Workspace, entry_of, report_sources


def run_aggregate(workspace: Workspace) -> str:
    """Write the report of a workspace; returns a summary in words. What is missing is shown in the tables."""
    result = aggregate_folder(workspace.root)
    return f"report of {result.n_expected - result.n_missing} of {result.n_expected} predictions: report/index.html"


def aggregate_folder(root: Path) -> AggregateResult:
    """Aggregate a workspace, or a folder that holds only predictions; in a workspace remember the sources."""
    if not (Path(root) / "study.toml").is_file():
        return aggregate(Path(root))
    workspace = Workspace(root)
    path = workspace.path(REPORT)
    result = aggregate(workspace.root, begin=lambda: seal.begin(path))
    cells = (cell for row in result.result.collection.cells.values() for cell in row.values())
    judge = Judge(workspace, check=True, read={cell.task.output: entry_of(cell.shard) for cell in cells})
    seal.write(path, report_sources(judge), result.files)
    return result
