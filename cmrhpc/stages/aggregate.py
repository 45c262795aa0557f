"""Predictions -> the report folder."""

from __future__ import annotations

from pathlib import Path

from cmrhpc import seal
from cmrhpc.errors import CmrhpcError, Damage, Incomplete
from cmrhpc.planning import REPORT
from cmrhpc.report.aggregate import aggregate
from cmrhpc.report.result import Result
from cmrhpc.validity import Judge, report_sources
from cmrhpc.workspace import Workspace, entry_of


def run_aggregate(workspace: Workspace) -> str:
    """Write the report of a workspace; returns a summary in words. Raises what is wrong with it once it is written."""
    result = aggregate_folder(workspace.root)
    if wrong := fault(result, workspace.root):
        wrong.kept = True
        raise wrong
    return f"report of {result.n_expected} predictions: report/index.html"


def fault(result: Result, root: Path) -> CmrhpcError | None:
    """What whoever makes a report ends with: leaks, else missing predictions, else nothing."""
    return _fault(_counts(result), root, *result.collection.leaks[:1])


def fault_of_the_last(workspace: Workspace) -> CmrhpcError | None:
    """The same of the report that is there, as its seal tells."""
    told = seal.read(workspace.path(REPORT))
    return _fault(told.counts, workspace.root) if told else None


def _counts(result: Result) -> seal.Counts:
    return seal.Counts(len(result.collection.leaks), result.n_missing, result.n_expected)


def _fault(counts: seal.Counts, root: Path, first_leak: str = "") -> CmrhpcError | None:
    if counts.leaks:
        what = f"{counts.leaks} leaks: patients are in training and in test"
        return Damage(what, "", "the page lists them; find out how these shards were made", first_leak)
    if counts.missing:
        what = f"{counts.missing} of {counts.expected} predictions are missing; the tables show where"
        return Incomplete(what, str(root), "cmrhpc run (or submit) makes what is missing, then aggregate again")
    return None


def aggregate_folder(root: Path) -> Result:
    """Aggregate a workspace, or a folder that holds only predictions; in a workspace remember the sources.

    Raises Incomplete for a workspace in which no prediction is computed yet.
    """
    if not (Path(root) / "study.toml").is_file():
        return aggregate(Path(root)).result
    workspace = Workspace(root)
    if not any(name.startswith("predictions/") for name in workspace.listing()):
        raise Incomplete("there are no predictions yet", str(root), "`cmrhpc run` (or submit) makes them")
    path = workspace.path(REPORT)
    made = aggregate(workspace.root, begin=lambda: seal.begin(path))
    cells = (cell for row in made.result.collection.cells.values() for cell in row.values())
    judge = Judge(workspace, check=True, read={cell.task.output: entry_of(cell.shard) for cell in cells})
    sources = report_sources(judge)
    found = made.result.collection
    for name in found.missing.keys() - found.refused.keys():
        sources.pop(name, None)  # what was computed since is not in the report
    seal.write(path, sources, made.files, _counts(made.result))
    # What killed jobs left: on a cluster no run sweeps the workspace.
    workspace.remove_stale(workspace.root)
    if (workspace.root / "checkpoints").exists():
        for output in sources.keys() & judge.makers.keys():
            workspace.clear_checkpoints(judge.makers[output])
    return made.result
