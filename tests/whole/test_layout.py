"""data_layout.md against the files of a real run: what is written is described, and what is described is written."""

from __future__ import annotations

import re
from pathlib import Path

from cmrhpc.shards import read_shard

TEXT = (Path(__file__).parents[2] / "data_layout.md").read_text()
SECTIONS = {
    "cohort-1": "### `cohort.h5`",
    "images-1": "### `synthetic/`",
    "predictions-1": "### `predictions/`",
}


def described(schema: str) -> set[str]:
    """Dataset names in the table of a schema's section."""
    section = TEXT.split(SECTIONS[schema], 1)[1].split("\n#", 1)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_dataset_is_described_and_every_described_one_is_written(finished: Path) -> None:
    written: dict[str, set[str]] = {}
    for path in finished.rglob("*.h5"):
        shard = read_shard(path)
        written.setdefault(shard.schema, set()).update(shard.names)
    for schema in SECTIONS:
        assert written[schema] == described(schema), schema
    assert {re.sub(r"\d+", "0", name) for name in written["folds-1"]} == {
        f"repeat0_fold0_{part}" for part in ("train", "validation", "test")
    }


def test_every_attribute_that_is_described_is_in_every_shard(finished: Path) -> None:
    import h5py

    table = TEXT.split("| `schema`", 1)[1].split("\n\n", 1)[0]
    names = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    names = ["schema", *names]
    assert "seconds" in names
    for path in finished.rglob("*.h5"):
        with h5py.File(path) as file:
            # Only what computes has an arithmetic, and what is large lies in a dataset of its own.
            lacking = {name for name in names if name not in file.attrs and f"header_{name}" not in file}
        assert lacking <= {"arithmetic"}, path.name


def test_every_attribute_and_every_file_of_the_report_is_described(finished: Path) -> None:
    import h5py

    for path in finished.rglob("*.h5"):
        with h5py.File(path) as file:
            for name in file.attrs:
                assert f"`{name}`" in TEXT, (path.name, name)
    for path in (finished / "report").iterdir():
        assert f"`{path.name}`" in TEXT or path.name == "figures", path.name
