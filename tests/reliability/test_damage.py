"""Whatever is changed behind our back is found by verify, and a run then makes exactly the damaged part again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cmrhpc import planning, shards, validity
from cmrhpc.launch.slurm import Limits
from cmrhpc.launch.status import status
from cmrhpc.launch.submit import Queue, propose
from cmrhpc.planning import REPORT, STAGES
from cmrhpc.profile import parse_profile
from cmrhpc.stages.task import run_task
from cmrhpc.verify import verify
from cmrhpc.workspace import Workspace
from tests.reliability.conftest import cmrhpc, copy_of, digest
from tests.reliability.damage import PREDICTION, REFINED, SYNTHETIC, forge


def flip(path: Path, place: float, bit: int = 3) -> None:
    """Change one bit in place: the file keeps its inode, so no listing can tell."""
    with open(path, "r+b") as stream:
        position = int(place * (path.stat().st_size - 1))
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


def damaged(root: Path) -> list[str]:
    found = verify(Workspace(root))
    assert found.leaks == []
    return found.damaged


def to_do(root: Path) -> list[str]:
    """Outputs that a run would look at again."""
    states = validity.states(Workspace(root), check=True)
    return [state.task.output for stage in STAGES for state in states[stage] if not state.done]


@pytest.mark.parametrize(
    "name",
    [
        "cohort.h5", "cohort.csv", "cohort.png", "folds.h5", f"{SYNTHETIC}.h5", f"{SYNTHETIC}.safetensors",
        f"{SYNTHETIC}.jsonl", f"{SYNTHETIC}.png", f"{REFINED}.h5", f"{REFINED}.safetensors", f"{PREDICTION}.h5",
        f"{PREDICTION}.jsonl", "report/table.csv", "report/index.html", "report/figures/accuracy.png",
        "report/sources.json", "tasks/synthesize/0001.json",
    ],
)  # fmt: skip
def test_a_flipped_bit_and_a_cut_are_found_in_every_kind_of_file(undisturbed: Path, copied: Path, name: str) -> None:
    rng = np.random.default_rng(sum(name.encode()))
    changes = [
        lambda path, place=place: flip(path, place, int(rng.integers(8))) for place in (0.0, *rng.random(3), 1.0)
    ]
    changes += [lambda path: os.truncate(path, path.stat().st_size - 1), lambda path: os.truncate(path, 0)]
    for change in changes:
        change(copied / name)
        assert any(Path(name).name in line for line in damaged(copied)), name
        shutil.copy(undisturbed / name, copied / name)
    assert damaged(copied) == []


def test_a_removed_companion_or_report_file_is_found(copied: Path) -> None:
    (copied / f"{SYNTHETIC}.safetensors").unlink()
    (copied / "report/table.csv").unlink()
    assert damaged(copied) == [
        f"{SYNTHETIC}.h5: fold0_repeat0_class0.safetensors: missing",
        "report/table.csv: missing",
    ]


def test_shards_that_were_swapped_by_copying_are_found_although_their_inodes_stay(copied: Path) -> None:
    Workspace(copied).index()
    a, b = copied / f"{PREDICTION}.h5", copied / PREDICTION.replace("fold0", "fold1")
    b = b.with_suffix(".h5")
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    lines = damaged(copied)
    assert [line.partition(": ")[0] for line in lines] == [f"{PREDICTION}.h5", str(b.relative_to(copied))]
    assert to_do(copied)[:2] == [f"{PREDICTION}.h5", str(b.relative_to(copied))]


def test_the_index_is_the_same_when_its_shards_are_read_side_by_side(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / f"{PREDICTION}.h5").write_bytes(b"damaged")
    (copied / "index.json").unlink(missing_ok=True)
    alone = Workspace(copied).index()
    (copied / "index.json").unlink()
    monkeypatch.setattr("cmrhpc.forked.LEAST", 1)
    monkeypatch.setattr("cmrhpc.forked._processes", lambda: 2)
    assert Workspace(copied).index() == alone
    assert len(alone) > 5
    assert f"{PREDICTION}.h5" not in alone
    assert all(entry.inode == (copied / name).stat().st_ino for name, entry in alone.items())


@pytest.mark.parametrize(("change", "reason"), [("seed", "seed changed"), ("settings", "generations: 3 -> 2")])
def test_a_shard_of_another_study_or_seed_is_found(copied: Path, tmp_path: Path, change: str, reason: str) -> None:
    other = copy_of(copied, tmp_path / "other")
    text = (other / "study.toml").read_text()
    replaced = ("seed = 7", "seed = 8") if change == "seed" else ("generations = 3", "generations = 2")
    (other / "study.toml").write_text(text.replace(*replaced))
    if change == "seed":
        run_task(Workspace(other), "ingest", 0)
    run_task(Workspace(other), "synthesize", 0)
    for ending in (".h5", ".safetensors", ".jsonl", ".png"):
        (copied / f"{SYNTHETIC}{ending}").write_bytes((other / f"{SYNTHETIC}{ending}").read_bytes())
    (line,) = damaged(copied)
    told = "seed changed" if change == "seed" else "generations: 2 -> 3"
    assert line.startswith(f"{SYNTHETIC}.h5: ")
    assert told in line
    assert SYNTHETIC + ".h5" in to_do(copied)
    # Seen from the other study, everything that the change decides is foreign.
    assert all(reason in line for line in damaged(other) if line.startswith("synthetic"))


def test_an_edited_study_is_found(copied: Path) -> None:
    text = (copied / "study.toml").read_text()
    (copied / "study.toml").write_text(text.replace("buffer = 8", "buffer = 9"))
    lines = damaged(copied)
    assert len([line for line in lines if "refiner.buffer: 8 -> 9" in line]) == 4
    assert cmrhpc("verify", copied, check=False).returncode == 5
    (copied / "study.toml").write_text(text.replace("[folds]", "[fo1ds]"))
    assert cmrhpc("verify", copied, check=False).returncode == 3


def test_a_report_older_than_the_study_is_out_of_date_and_no_damage(copied: Path) -> None:
    assert verify(Workspace(copied)).out_of_date == []
    text = (copied / "study.toml").read_text()
    (copied / "study.toml").write_text(text + '[[arms]]\nname = "affine"\n')
    found = verify(Workspace(copied))
    assert (found.damaged, found.missing) == ([], 2)
    assert found.out_of_date == ["report: out of date, study.toml changed since it was made"]
    done = cmrhpc("verify", copied, check=False)
    assert done.returncode == 4
    assert found.out_of_date[0] in done.stdout
    assert done.stdout.splitlines()[-1] == f"digest {found.digest}"
    assert "nothing is damaged" in done.stderr
    as_json = cmrhpc("verify", copied, "--json", check=False)
    assert (as_json.returncode, json.loads(as_json.stdout)["out_of_date"]) == (4, found.out_of_date)
    (copied / "study.toml").write_text(text)
    (copied / f"{PREDICTION}.h5").unlink()
    (line,) = verify(Workspace(copied)).out_of_date
    assert "shards were added, removed or changed" in line


def test_a_workspace_without_shards_has_nothing_to_verify(fresh: Path) -> None:
    done = cmrhpc("verify", fresh, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    count = sum(len(found) for found in validity.states(Workspace(fresh), freeze=False).values())
    assert f"nothing to verify: no task is done yet, {count} are missing" in done.stderr


def test_a_planted_leak_is_found_and_is_exit_5(copied: Path) -> None:
    folds = shards.read_shard(copied / "folds.h5")
    tested = folds["repeat0_fold0_test"]
    train = shards.read_shard(copied / f"{PREDICTION}.h5")["train_id"].copy()
    train[0] = tested[0]
    forge(copied, f"{PREDICTION}.h5", train_id=train)
    found = verify(Workspace(copied))
    assert len(found.leaks) == 1
    assert found.leaks[0].startswith(f"{PREDICTION}.h5: patients p0")
    assert "are in training and in test" in found.leaks[0]
    done = cmrhpc("verify", copied, check=False)
    assert done.returncode == 5
    assert found.leaks[0] in done.stdout
    assert "1 leaks" in done.stderr


def test_a_leak_into_a_generator_and_copies_of_real_images_are_found(copied: Path) -> None:
    folds, cohort = shards.read_shard(copied / "folds.h5"), shards.read_shard(copied / "cohort.h5")
    forge(copied, f"{SYNTHETIC}.h5", train_id=folds["repeat0_fold0_test"])
    image = shards.read_shard(copied / f"{REFINED}.h5")["image"].copy()
    image[1] = cohort["image"][4]
    forge(copied, f"{REFINED}.h5", image=image)
    leaks = verify(Workspace(copied)).leaks
    assert sorted(line.partition(": ")[0] for line in leaks) == [f"{REFINED}.h5", f"{SYNTHETIC}.h5"]
    assert sum(line.endswith("1 images are copies of real ones, equal to 8 bits") for line in leaks) == 1


def test_predictions_that_test_other_images_than_their_fold_are_found(copied: Path) -> None:
    shard = shards.read_shard(copied / f"{PREDICTION}.h5")
    ids = shard["id"].copy()
    ids[0] = shard["train_id"][0]
    forge(copied, f"{PREDICTION}.h5", id=ids)
    assert any("does not test the images of its fold" in line for line in verify(Workspace(copied)).leaks)


def test_a_shard_that_the_study_does_not_ask_for_changes_no_digest(undisturbed: Path, copied: Path) -> None:
    extra = copied / "predictions/affine/ratio0/resnet50/fold0_repeat0.h5"
    extra.parent.mkdir(parents=True)
    shutil.copy(copied / f"{PREDICTION}.h5", extra)
    shutil.copy(copied / f"{PREDICTION}.jsonl", extra.parent)
    assert digest(copied) == digest(undisturbed)


def test_a_run_makes_exactly_the_damaged_part_again(undisturbed: Path, copied: Path) -> None:
    flip(copied / f"{SYNTHETIC}.h5", 0.5)
    os.truncate(copied / f"{REFINED}.png", 10)
    flip(copied / "report/table.csv", 0.5)
    assert cmrhpc("verify", copied, check=False).returncode == 5
    assert len(json.loads(cmrhpc("verify", copied, "--json", check=False).stdout)["damaged"]) == 3
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.h5")}
    cmrhpc("run", copied, "--jobs", "2", "--plain")
    again = {path.relative_to(copied).as_posix() for path in before if path.stat().st_mtime_ns != before[path]}
    assert again == {f"{SYNTHETIC}.h5", f"{REFINED}.h5"}
    assert digest(copied) == digest(undisturbed)


def known(root: Path) -> set[tuple[str, str]]:
    """(output, reason) of what `plan`, `status` and `submit` count as missing, which hash no shard; they agree."""
    planned = json.loads(cmrhpc("plan", root, "--json").stdout)["tasks"]
    told = {(one["output"], one["reason"]) for one in planned if not one["done"]}
    indices = {(one["stage"], one["index"]) for one in planned if not one["done"]}
    workspace = Workspace(root)
    rows = status(workspace).stages.items()
    assert {(stage, task.state.index) for stage, row in rows for task in row.tasks} == indices
    sent = propose(workspace, parse_profile(""), Queue([], {}, {}), Limits()).arrays
    report = {("aggregate", 0)} if indices else set()
    assert {(array.stage, index) for array in sent for index in array.tasks} == indices | report
    return told


@pytest.mark.parametrize(
    ("name", "output", "reason"),
    [
        (f"{SYNTHETIC}.h5", f"{SYNTHETIC}.h5", "damaged: its checksum does not hold"),
        (f"{REFINED}.png", f"{REFINED}.h5", f"{Path(REFINED).name}.png: its checksum does not hold"),
        ("cohort.csv", "folds.h5", "cohort.csv: its checksum does not hold"),
        ("report/table.csv", REPORT, "damaged: table.csv: its checksum does not hold"),
    ],
)
def test_what_verify_found_is_sent_and_made_again_also_without_run(
    undisturbed: Path, copied: Path, name: str, output: str, reason: str
) -> None:
    assert known(copied) == set()
    flip(copied / name, 0.9)
    assert cmrhpc("verify", copied, check=False).returncode == 5
    assert (output, reason) in known(copied)
    stage = next(
        stage for stage in STAGES for s in validity.states(Workspace(copied))[stage] if s.task.output == output
    )
    text = cmrhpc("plan", copied, "--stage", stage, "--array").stdout.strip()
    assert text.isdigit()
    cmrhpc("task", copied, "--stage", stage, "--index", text)
    assert known(copied) == set()
    assert digest(copied) == digest(undisturbed)


def test_a_task_that_meets_a_damaged_input_has_it_made_again(copied: Path) -> None:
    workspace = Workspace(copied)
    refined = validity.states(workspace, ("refine",))["refine"]
    reader = next(s for s in refined if f"{SYNTHETIC}.h5" in planning.inputs(workspace.study, s.task))
    picture = workspace.path(reader.task.output).with_suffix(".png")
    flip(picture, 0.9)
    assert cmrhpc("verify", copied, check=False).returncode == 5
    own = (reader.task.output, f"{picture.name}: its checksum does not hold")
    assert known(copied) == {own}
    flip(copied / f"{SYNTHETIC}.h5", 0.9)
    done = cmrhpc("task", copied, "--stage", "refine", "--index", str(reader.index), check=False)
    assert done.returncode == 3
    assert (f"{SYNTHETIC}.h5", "damaged: its checksum does not hold") in known(copied)
    index = next(s.index for s in validity.states(workspace)["synthesize"] if s.task.output == f"{SYNTHETIC}.h5")
    cmrhpc("task", copied, "--stage", "synthesize", "--index", str(index))
    assert known(copied) == {own}


def test_what_was_mended_by_hand_is_not_sent_for_ever(undisturbed: Path, copied: Path) -> None:
    for name in (f"{SYNTHETIC}.h5", f"{PREDICTION}.jsonl"):
        flip(copied / name, 0.9)
    assert cmrhpc("verify", copied, check=False).returncode == 5
    for name in (f"{SYNTHETIC}.h5", f"{PREDICTION}.jsonl"):
        (copied / name).write_bytes((undisturbed / name).read_bytes())  # in place: the numbers stay
    found = {output for output, _ in known(copied)}
    assert {f"{SYNTHETIC}.h5", f"{PREDICTION}.h5"} <= found
    for stage, output in (("synthesize", SYNTHETIC), ("classify", PREDICTION)):
        index = next(s.index for s in validity.states(Workspace(copied))[stage] if s.task.output == f"{output}.h5")
        assert "already done" in cmrhpc("task", copied, "--stage", stage, "--index", str(index)).stdout
    assert known(copied) == set()


def test_links_to_shards_elsewhere_are_not_followed(undisturbed: Path, copied: Path) -> None:
    for name in (f"{SYNTHETIC}.h5", "refined"):
        path = copied / name
        path.rename(path.with_name("aside"))
        path.symlink_to(path.with_name("aside"))
    assert {name for name in to_do(copied) if not name.startswith(("predictions", "report"))} == {
        f"{SYNTHETIC}.h5",
        *(f"refined/simgan/dae-gan/fold{fold}_repeat0_class{label}.h5" for fold in (0, 1) for label in (0, 1)),
    }
    assert verify(Workspace(copied)).missing == 5
    run_task(Workspace(copied), "synthesize", 0)
    assert not (copied / f"{SYNTHETIC}.h5").is_symlink()
    assert shards.read_shard(copied / f"{SYNTHETIC}.h5").content_sha256 == (
        shards.read_shard(undisturbed / f"{SYNTHETIC}.h5").content_sha256
    )


@pytest.mark.parametrize("damage", ["heading", "endless field"])
def test_a_damaged_report_of_ingest_is_not_believed_but_made_again(copied: Path, damage: str) -> None:
    report = copied / "cohort.csv"
    text = report.read_bytes()
    report.write_bytes(text.replace(b"mask_sha256", b"mask_sha257") if damage == "heading" else b'"' + text * 50)
    done = cmrhpc("verify", copied, check=False)
    assert done.returncode == 5
    assert "cohort.h5: cohort.csv: its checksum does not hold" in done.stdout
    cmrhpc("run", copied)
    assert report.read_bytes() == text
    assert damaged(copied) == []


def test_no_shard_is_opened_before_its_checksum_was_seen_to_hold(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HDF5 library can hang on a flipped bit, and a restored copy is new to the index."""
    shutil.copy(copied / f"{REFINED}.h5", tmp_path / "copy.h5")
    flip(tmp_path / "copy.h5", 0.5)
    os.replace(tmp_path / "copy.h5", copied / f"{REFINED}.h5")
    seen: list[str] = []
    opened = shards.opened
    monkeypatch.setattr(shards, "opened", lambda path: (seen.append(str(path)), opened(path))[1])
    workspace = Workspace(copied)
    assert f"{REFINED}.h5" not in workspace.index()
    for check in (False, True):
        assert not all(state.done for state in validity.states(workspace, check=check)["refine"])
    assert verify(workspace).damaged
    assert str(copied / f"{SYNTHETIC}.h5") in seen
    assert str(copied / f"{REFINED}.h5") not in seen
