"""The raw folder changes after, or while, it is read: what depends on it is made again, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmrhpc import validity
from cmrhpc.data import ingest as ingest_module
from cmrhpc.data.images import Reader
from cmrhpc.errors import BadInput
from cmrhpc.shards import read_shard
from cmrhpc.stages.task import run_task
from cmrhpc.workspace import Workspace
from tests.whole.conftest import cmrhpc, make_workspace


def raw_file(root: Path, column: int, row: int = 2) -> Path:
    """What a row of the table names."""
    return root / "raw" / (root / "raw/cohort.csv").read_text().splitlines()[row].split(",")[column]


@pytest.mark.parametrize(("what", "column"), [("image", 0), ("mask", 3)])
def test_a_changed_raw_file_is_named_and_ingested_again(tmp_path: Path, what: str, column: int) -> None:
    root = make_workspace(tmp_path / "ws")
    assert (root / "raw/cohort.csv").read_text().split(",")[column] == what
    workspace = Workspace(root)
    run_task(workspace, "ingest", 0)
    before = read_shard(root / "cohort.h5").content_sha256
    # Another slice of the same patient, on the same grid.
    raw_file(root, column).write_bytes(raw_file(root, column, row=1).read_bytes())
    assert validity.states(workspace)["ingest"][0].done  # planning looks at the table alone
    [state] = validity.states(workspace, check=True)["ingest"]
    assert state.reason == f"the {what} of row 2 changed"
    done = cmrhpc("verify", root, check=False)
    assert done.returncode == 5
    assert f"cohort.h5: the {what} of row 2 changed" in done.stdout
    assert validity.states(workspace)["ingest"][0].reason == "the raw images or masks changed"  # `verify` told it
    run_task(workspace, "ingest", 0)
    assert validity.states(workspace)["ingest"][0].done
    assert validity.states(workspace, check=True)["ingest"][0].done
    assert read_shard(root / "cohort.h5").content_sha256 != before


def test_a_raw_file_that_gives_the_same_image_is_asked_for_once(tmp_path: Path) -> None:
    root = make_workspace(tmp_path / "ws")
    workspace = Workspace(root)
    run_task(workspace, "ingest", 0)
    before = read_shard(root / "cohort.h5").content_sha256
    file = raw_file(root, 0)
    file.write_bytes(file.read_bytes().replace(b"NDims = 3", b"NDims =  3"))
    assert validity.states(workspace, check=True)["ingest"][0].reason == "the image of row 2 changed"
    run_task(workspace, "ingest", 0)
    for check in (True, False):
        assert validity.states(workspace, check=check)["ingest"][0].done
    assert read_shard(root / "cohort.h5").content_sha256 == before


def test_a_file_that_is_gone_is_named_and_a_folder_out_of_reach_is_not_looked_for(tmp_path: Path) -> None:
    root = make_workspace(tmp_path / "ws")
    workspace = Workspace(root)
    run_task(workspace, "ingest", 0)
    raw_file(root, 0).unlink()
    gone = "cohort.csv row 2 (line 3), column image: the image does not exist"
    assert validity.states(workspace, check=True)["ingest"][0].reason == gone
    raw_file(root, 0).symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"of somebody else")
    assert "a link that leaves the raw folder" in validity.states(workspace, check=True)["ingest"][0].reason
    (root / "raw").rename(tmp_path / "elsewhere")
    assert validity.states(workspace, check=True)["ingest"][0].done


def test_a_table_that_is_edited_meanwhile_is_not_taken_for_the_one_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_workspace(tmp_path / "ws")
    table, read, seen = root / "raw/cohort.csv", Reader.read, []

    def read_and_edit(self: Reader, *arguments: object) -> object:
        seen.append(0)
        if len(seen) == 3:  # somebody withdraws consent
            table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
        return read(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "read", read_and_edit)
    workspace = Workspace(root)
    run_task(workspace, "ingest", 0)
    assert validity.states(workspace)["ingest"][0].reason == "the table cohort.csv changed"

    read_table = ingest_module.read_table
    monkeypatch.setattr(
        ingest_module,
        "read_table",
        lambda *a, **k: (read_table(*a, **k), table.write_text(table.read_text() + "\n"))[0],
    )
    with pytest.raises(BadInput, match="changed while it was read"):
        run_task(workspace, "ingest", 0)


def test_the_raw_folder_cannot_be_the_workspace(tmp_path: Path) -> None:
    root = make_workspace(tmp_path / "ws")
    raw, table = root / "raw", (root / "raw/cohort.csv").read_bytes()
    done = cmrhpc("init", raw, "--study", "demo", "--raw", raw, check=False)
    assert done.returncode == 3
    assert "the raw folder cannot be the workspace" in done.stderr
    (raw / "study.toml").write_text((root / "study.toml").read_text().replace('raw = "raw"', 'raw = "."'))
    done = cmrhpc("ingest", raw, check=False)
    assert done.returncode == 3
    assert "the raw folder is the workspace" in done.stderr
    assert (raw / "cohort.csv").read_bytes() == table
