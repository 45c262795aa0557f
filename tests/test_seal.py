"""The seal of a report: what it vouches for, and what it reads of an earlier version."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from cmrhpc import files, seal
from cmrhpc.errors import Incomplete
from cmrhpc.hashing import sha256_of


def test_a_report_that_another_process_changes_all_the_time_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.csv").write_text("ours")
    write_ours, number = files.atomic_write, itertools.count()

    def write_both(path: Path, data: str) -> None:
        write_ours(path, data)
        (tmp_path / "table.csv").write_text(str(next(number)))

    monkeypatch.setattr(files, "atomic_write", write_both)
    with pytest.raises(Incomplete, match="another process keeps writing this report"):
        seal.write(tmp_path / "sources.json", {"study": "ab"}, {"table.csv": sha256_of(b"ours")}, seal.Counts())


def test_a_seal_of_an_earlier_version_counts_nothing_and_is_whole(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("ours")
    told = {"sources": {"study": "ab"}, "files": {"table.csv": sha256_of(b"ours")}}
    text = json.dumps(told | {"sha256": sha256_of(told)}, indent=0)
    (tmp_path / "sources.json").write_text(text)
    assert seal.damage(tmp_path / "sources.json") == []
    found = seal.read(tmp_path / "sources.json")
    assert found is not None
    assert (found.sources, found.counts) == ({"study": "ab"}, seal.Counts())
