"""Every reader, fed with mutated files: no crash, no hang, no traceback; a right result or one BadInput."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cmrhpc import shards
from cmrhpc.data import images
from cmrhpc.hashing import sha256_of
from cmrhpc.workspace import Workspace
from tests.conftest import ROOT, STUDY
from tests.data.raw_folder import picture, save
from tests.reliability.fuzz import IMAGE_READER, IMAGES, IN_WORKERS, READERS, SECONDS, fuzz, fuzz_in_workers

SHARE = {  # of the inputs; the fast readers get more
    "csv": 16, "toml": 10, "profile": 7, "submission": 4, "sums": 4, "train_ids": 2, "images_csv": 2, "tasks": 4,
    "index": 4, "record": 4, "seal": 4, "checkpoint": 5, "hdf5_unstamped": 6, "hdf5": 8,
} | {f"image.{ending}": 2 for ending in IMAGES}  # fmt: skip
UNREFUSED = {"index", "record", "seal", "checkpoint", "submission", "hdf5_unstamped"}  # they pass over what is broken
LONG_COUNT = int(os.environ.get("CMRHPC_TEST_INPUTS", "100000"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One good file for each reader, named seed_READER, and a workspace for those that need one."""
    import torch

    from cmrhpc import seal
    from cmrhpc.launch import records, submissions
    from cmrhpc.train.checkpoint import Checkpoints

    root = tmp_path / "workspace"
    root.mkdir()
    (root / "study.toml").write_text(STUDY)
    workspace = Workspace(root)
    workspace.tasks("classify")
    (tmp_path / "seed_tasks").write_bytes((root / "tasks/classify/0001.json").read_bytes())
    (tmp_path / "seed_toml").write_text(STUDY)
    lines = [f"a/{i}.mha,{i % 2},p{i},m/{i}.mha,1.2x1.3,300,1800" for i in range(5)]
    heading = "image,label,patient,mask,spacing_mm,window_low,window_high"
    (tmp_path / "seed_csv").write_text("\n".join([heading, *lines, '"a,b.mha",1,"p 9",,,,']) + "\n")
    shards.write_shard(
        root / "cohort.h5",
        {
            "image": np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype("f4"),
            "label": np.arange(3),
            "id": shards.text_array(["r1", "r2", "r3"]),
            "score": np.eye(3),
            "none": np.zeros((0, 2), "u1"),
        },
        schema="cohort-1",
        task={"stage": "ingest"},
        settings={"a": {"b": [1, 2.5, None, "c"]}},
        inputs={"cohort.csv": "ab" * 32},
        seed=3,
        attributes={"classes": ["0", "1"]},
        companions={".csv": b"x"},
    )
    workspace.index()
    (tmp_path / "seed_index").write_bytes((root / "index.json").read_bytes())
    (root / "cohort.h5").rename(tmp_path / "seed_hdf5")
    records.write_record(workspace, "ingest", 0, records.FAILED, "a reason")
    (tmp_path / "seed_record").write_bytes((root / "logs/ingest_0.json").read_bytes())
    (root / "report").mkdir()
    (root / "report/table.csv").write_text("a")
    seal.write(root / "report/sources.json", {"study": "ab"}, {"table.csv": sha256_of(b"a")}, seal.Counts(0, 1, 10))
    (tmp_path / "seed_seal").write_bytes((root / "report/sources.json").read_bytes())
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0), "rng": torch.zeros(4, dtype=torch.uint8)}
    Checkpoints(tmp_path / "kept", {"a": 1}).save(3, tensors, {"position": 1, "history": [{"loss": 0.5}]})
    (tmp_path / "seed_checkpoint").write_bytes((tmp_path / "kept/step0000000003.checkpoint").read_bytes())
    (tmp_path / "seed_profile").write_bytes((ROOT / "slurm/profiles/template.toml").read_bytes())
    submission = submissions.Submission("7", "classify", ((0,), (1, 2)), 1.5e9, depends_on=("6",), name="a")
    told = json.loads(submissions.as_text(submission))
    del told["sha256"]  # it may be left out, and would refuse every mutation
    (tmp_path / "seed_submission").write_text(json.dumps(told))
    names = [f"./fold0_repeat0_class{n % 2}/{n:06d}.png" for n in range(6)]
    (tmp_path / "seed_sums").write_text("".join(f"{sha256_of(name)}  {name}\n" for name in names))
    (tmp_path / "seed_train_ids").write_text("id\n" + "".join(f"r{n:06d}\n" for n in range(9)))
    lines = [f"{n:06d}.png,raw,{n},1800.5" for n in range(5)]
    (tmp_path / "seed_images_csv").write_text("\n".join(["image,unit,window_low,window_high", *lines]) + "\n")
    for ending in IMAGES:
        save(tmp_path / f"seed_image.{ending}", (picture(0) // 8).astype(np.uint8))
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def image_reader() -> Iterator[None]:
    """Its helper process ends with these tests, and is given up before the alarm would leave a request unanswered."""
    with pytest.MonkeyPatch.context() as patch, IMAGE_READER:
        patch.setattr(images, "TIMEOUT", SECONDS / 2)
        yield


def fuzz_reader(reader: str, folder: Path, seed: int, count: int) -> Counter[str]:
    """Counts by result, after a look at the unmutated file. In workers HDF5 may die or hang on a forged stamp."""
    path = folder / f"input_{reader}"
    path.write_bytes((folder / f"seed_{reader.removesuffix('_unstamped')}").read_bytes())
    assert READERS[reader](path) is not False
    found = (fuzz_in_workers if reader in IN_WORKERS else fuzz)(reader, folder, seed, count)
    assert sum(found.values()) == count
    assert reader in IN_WORKERS or set(found) <= {"good", "refused"}
    return found


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files_are_read_right_or_refused(folder: Path, reader: str) -> None:
    found = fuzz_reader(reader, folder, 1, 10 * SHARE[reader])
    assert found["refused"] or reader in UNREFUSED or reader.startswith("image.")


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_a_hundred_thousand_mutated_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed, total, told = int(time.time()), 0, {}
    for reader, share in SHARE.items():
        count = -(-LONG_COUNT * share // 100)
        told[reader] = dict(fuzz_reader(reader, folder, seed, count))
        total += count
        with capsys.disabled():
            print(f"\n{reader}: {count} inputs: {told[reader]}", end="")
    with capsys.disabled():
        print(f"\nfuzzing, seed {seed}: {total} inputs")
    (folder / "told.json").write_text(json.dumps(told))
