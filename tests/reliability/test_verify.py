"""What verify says: what was there and is gone is damage, what was never made is not; no proof is claimed unmade."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cmrhpc import seal, shards, validity
from cmrhpc.errors import BadInput
from cmrhpc.stages.aggregate import aggregate_folder
from cmrhpc.stages.task import run_task
from cmrhpc.verify import Verdict, verify
from cmrhpc.workspace import Workspace
from tests.outputs import name_of_ended_process
from tests.reliability.conftest import cmrhpc, command, needs_root
from tests.reliability.damage import PREDICTION, SYNTHETIC, forge

PROOF = "no patient is in training and in test of the same fold"


def found(root: Path) -> Verdict:
    return verify(Workspace(root))


def only(source: Path, target: Path, *names: str) -> Path:
    """A workspace with the study and some of the files of another."""
    target.mkdir()
    for name in ("study.toml", *names):
        shutil.copy(source / name, target / name)
    return target


# ------------------------------------------------------------------------------------------------ leaks


def test_no_proof_is_claimed_without_cohort_or_folds(copied: Path, tmp_path: Path) -> None:
    assert PROOF in cmrhpc("verify", copied).stdout
    train = shards.read_shard(copied / f"{PREDICTION}.h5")["train_id"].copy()
    train[0] = shards.read_shard(copied / "folds.h5")["repeat0_fold0_test"][0]
    forge(copied, f"{PREDICTION}.h5", train_id=train)
    (copied / "cohort.h5").unlink()
    done = cmrhpc("verify", copied, check=False)
    assert done.returncode == 5
    assert "leaks could not be looked for: cohort.h5 missing, damaged or not what the study asks for" in done.stdout
    assert PROOF not in done.stdout
    begun = only(copied, tmp_path / "begun", "folds.h5")
    assert found(begun).leaks_unchecked.startswith("cohort.h5")


def test_a_workspace_that_was_stopped_between_cohort_and_folds_is_incomplete(copied: Path, tmp_path: Path) -> None:
    begun = only(copied, tmp_path / "begun", "cohort.h5", "cohort.csv", "cohort.png")
    assert found(begun).damaged == []
    done = cmrhpc("verify", begun, check=False)
    assert done.returncode == 4
    assert "nothing is damaged, but leaks could not be looked for: folds.h5 missing" in done.stderr
    assert PROOF not in done.stdout
    told = json.loads(cmrhpc("verify", begun, "--json", check=False).stdout)
    assert told["leaks_unchecked"] == "folds.h5 missing, damaged or not what the study asks for"


def test_folds_that_leak_are_found_before_anything_is_trained(copied: Path, tmp_path: Path) -> None:
    root = only(copied, tmp_path / "w", "cohort.h5", "cohort.csv", "cohort.png", "folds.h5")
    assert (found(root).leaks, found(root).damaged) == ([], [])
    shard = shards.read_shard(root / "folds.h5")
    folds = {name: shard[name] for name in shard.names}
    train, test = folds["repeat0_fold0_train"], folds["repeat0_fold0_test"]
    moved = {"repeat0_fold0_train": np.concatenate([train, test[:1]]), "repeat0_fold0_test": test[1:]}
    forge(root, "folds.h5", **moved)
    assert found(root).leaks == ["folds.h5: leak in repeat 0 fold 0: train and test share 1 patient(s)"]
    assert cmrhpc("verify", root, check=False).returncode == 5
    same = {f"repeat0_fold1_{part}": folds[f"repeat0_fold0_{part}"] for part in ("train", "validation", "test")}
    forge(root, "folds.h5", **{"repeat0_fold0_train": train, "repeat0_fold0_test": test}, **same)
    assert found(root).leaks == ["folds.h5: repeat 0 does not test every image once"]


def test_a_cohort_that_holds_one_image_under_two_patients_leaks(copied: Path, tmp_path: Path) -> None:
    """The first image also as the second, of the same patient, which leaks nothing, and as the last, of another."""
    root = only(copied, tmp_path / "w")
    shutil.copytree(copied / "raw", root / "raw")
    with open(root / "raw" / "cohort.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0]["patient"] == rows[1]["patient"] != rows[-1]["patient"]
    for row in (rows[1], rows[-1]):
        for column in ("image", "mask"):
            shutil.copy(root / "raw" / rows[0][column], root / "raw" / row[column])
    run_task(Workspace(root), "ingest", 0)
    told = f"cohort.h5: 1 images are those of another patient, equal to 8 bits: r{len(rows):06d} is r000001"
    assert found(root).leaks == [told]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("an image left out", "it does not test the images of its fold, each once"),
        ("an image twice", "it does not test the images of its fold, each once"),
        ("labels inverted", "label: 4 differ from the cohort"),
        ("patients permuted", "patient: "),
        ("a training image left out", "it was not trained and validated on all images of its fold, each once"),
        ("validation labels inverted", "validation_label: "),
    ],
)
def test_predictions_that_are_not_those_of_their_fold_are_found(copied: Path, change: str, told: str) -> None:
    shard = shards.read_shard(copied / f"{PREDICTION}.h5")
    data = {name: shard[name].copy() for name in ("id", "patient", "label", "score", "train_id", "validation_label")}
    if change == "an image left out":  # another of the same patient is kept
        patients = data["patient"].tolist()
        row = next(i for i, one in enumerate(patients) if patients.count(one) > 1)
        data |= {name: np.delete(data[name], row, axis=0) for name in ("id", "patient", "label", "score")}
    elif change == "an image twice":
        for name in ("id", "patient", "label", "score"):
            data[name] = np.concatenate([data[name], data[name][:1]])
    elif change == "labels inverted":
        data["label"] = 1 - data["label"]
        told = f"label: {len(data['label'])} differ from the cohort"
    elif change == "patients permuted":
        data["patient"] = data["patient"][::-1].copy()
    elif change == "a training image left out":
        data["train_id"] = data["train_id"][1:]
    else:
        data["validation_label"] = 1 - data["validation_label"]
    forge(copied, f"{PREDICTION}.h5", **data)
    (line,) = found(copied).leaks
    assert line.startswith(f"{PREDICTION}.h5: {told}")


def test_a_generator_that_saw_validation_images_is_found(copied: Path) -> None:
    forge(copied, f"{SYNTHETIC}.h5", train_id=shards.read_shard(copied / "folds.h5")["repeat0_fold0_validation"])
    (line,) = found(copied).leaks
    assert line.startswith(f"{SYNTHETIC}.h5: ")
    assert "are not in the training set of its fold" in line


# ------------------------------------------------------------------------------------------------ what is gone


def test_a_shard_that_others_were_made_from_is_missed_and_one_that_none_was_is_not_done(copied: Path) -> None:
    (copied / f"{SYNTHETIC}.h5").unlink()
    refined = "refined/simgan/dae-gan/fold0_repeat0_class0.h5"
    assert found(copied).damaged == [f"{SYNTHETIC}.h5: missing, although {refined} and 1 more came from it"]
    assert cmrhpc("verify", copied, check=False).returncode == 5
    cmrhpc("run", copied, "--jobs", "2", "--plain")
    (copied / f"{PREDICTION}.h5").unlink()
    assert found(copied).damaged == [f"{PREDICTION}.h5: missing, although the report came from it"]
    shutil.rmtree(copied / "report")
    assert (found(copied).damaged, found(copied).missing) == ([], 2)
    done = cmrhpc("verify", copied)
    assert "2 tasks are not done yet" in done.stdout


def test_what_the_study_no_longer_asks_for_may_go(copied: Path) -> None:
    text = (copied / "study.toml").read_text()
    arms = '[[arms]]\nname = "none"\n[[arms]]\nname = "affine"\n'
    primary = '[primary]\nclassifier = "resnet50"\narm = "affine"\nratio = 0\n'
    (copied / "study.toml").write_text(text.partition("[[arms]]")[0] + arms + primary)
    for folder in ("synthetic", "refined", "predictions/dae-gan+simgan"):
        shutil.rmtree(copied / folder)
    assert found(copied).damaged == []


def test_a_report_that_lost_its_seal_is_damaged_and_one_that_was_not_finished_is_not(copied: Path) -> None:
    sealed = copied / "report/sources.json"
    text = sealed.read_text()
    sealed.unlink()
    (copied / "report/table.csv").write_text("classifier\n")
    assert found(copied).damaged == ["report/sources.json: missing, so nothing vouches for the report"]
    assert cmrhpc("verify", copied, check=False).returncode == 5
    sealed.write_text(text)
    shutil.rmtree(copied / "report/figures")
    (copied / "report/figures").write_text("in the way")
    with pytest.raises(BadInput):
        aggregate_folder(copied)
    assert (found(copied).damaged, found(copied).out_of_date) == ([], ["report: its making was not finished"])
    assert cmrhpc("verify", copied, check=False).returncode == 4
    assert validity.states(Workspace(copied))["aggregate"][0].reason == "its making was not finished"
    (copied / "report/figures").unlink()
    cmrhpc("run", copied, "--plain")
    assert found(copied).out_of_date == []


def test_a_prediction_that_comes_while_the_report_is_made_puts_it_out_of_date(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "away.h5"
    shutil.move(copied / f"{PREDICTION}.h5", away)
    begin = seal.begin

    def come_back(path: Path) -> None:
        shutil.move(away, copied / f"{PREDICTION}.h5")
        begin(path)

    monkeypatch.setattr(seal, "begin", come_back)
    assert aggregate_folder(copied).n_missing == 1
    assert [line.partition(":")[0] for line in found(copied).out_of_date] == ["report"]
    monkeypatch.undo()
    aggregate_folder(copied)
    assert found(copied).out_of_date == []


def test_a_report_sweeps_what_killed_jobs_left(copied: Path) -> None:
    """On a cluster every task looks at its own folders, and those that are done run no more."""
    stale = name_of_ended_process(copied / "predictions/a.h5")
    done, missing = (copied / "checkpoints" / name / "step0000000001.checkpoint" for name in (SYNTHETIC, PREDICTION))
    for path in (stale, done, missing):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (copied / f"{PREDICTION}.h5").unlink()
    aggregate_folder(copied)
    assert (stale.exists(), done.parent.exists(), missing.exists()) == (False, False, True)


def test_a_report_with_files_of_another_process_is_out_of_date_and_not_damaged(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = seal.write

    def meanwhile(path: Path, sources: dict[str, str], written: dict[str, str], counts: seal.Counts) -> None:
        (copied / "report/table.csv").write_text("of another process")
        write(path, sources, written, counts)

    monkeypatch.setattr(seal, "write", meanwhile)
    aggregate_folder(copied)
    assert (found(copied).damaged, found(copied).out_of_date) == ([], ["report: its making was not finished"])


def test_a_file_that_is_not_of_the_report_is_not_sealed(copied: Path) -> None:
    for name in (".nfs00000012", ".~lock.table.csv#"):
        (copied / "report" / name).write_text("for a moment")
    aggregate_folder(copied)
    for name in (".nfs00000012", ".~lock.table.csv#"):
        (copied / "report" / name).unlink()
    assert found(copied).damaged == []


def test_what_has_the_name_of_a_shard_and_is_none_is_named(copied: Path) -> None:
    (copied / f"{SYNTHETIC}.h5").unlink()
    (copied / f"{SYNTHETIC}.h5/keep").mkdir(parents=True)
    (line,) = found(copied).damaged
    assert line == f"{SYNTHETIC}.h5: a folder has its name: remove it"
    with pytest.raises(BadInput, match="a folder has the name") as error:
        run_task(Workspace(copied), "synthesize", 0)
    assert error.value.mend.startswith("remove it")
    shutil.rmtree(copied / f"{SYNTHETIC}.h5")
    (copied / f"{SYNTHETIC}.h5").symlink_to(copied / "nowhere")
    (line,) = found(copied).damaged
    assert line == f"{SYNTHETIC}.h5: it is reached through a link, which is not followed: remove the link"


def test_a_file_name_that_is_no_text_stops_nothing(copied: Path) -> None:
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    moved = os.fsencode(copied) + b"\xff"
    os.rename(copied, moved)
    done = subprocess.run(command("run", os.fsdecode(moved)), capture_output=True, text=True, env=strict)
    assert done.returncode == 0, done.stderr
    assert "report page: " in done.stdout
    os.rename(moved, copied)
    with open(os.fsencode(copied) + b"/synthetic/\x1b]0;\xff.h5", "wb") as stream:
        stream.write(b"no shard")
    done = subprocess.run(command("verify", copied), capture_output=True, text=True, env=strict)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert "synthetic/\\x1b]0;\\udcff.h5: shard not a shard of cmrhpc" in done.stdout


# ------------------------------------------------------------------------------------------------ task lists


def test_a_task_list_that_is_gone_is_missed_and_not_made_again(copied: Path) -> None:
    (copied / "tasks/classify/0001.json").unlink()
    (line,) = found(copied).damaged
    assert line.startswith("tasks/classify/0001.json: missing, no list holds the task of predictions/")
    assert cmrhpc("verify", copied, check=False).returncode == 5
    assert os.listdir(copied / "tasks/classify") == []
    shutil.rmtree(copied / "tasks")  # and where no task was done there was nothing to lose
    for name in ("synthetic", "refined", "predictions", "report"):
        shutil.rmtree(copied / name)
    assert found(copied).damaged == []
    assert not (copied / "tasks").exists()


def test_a_list_of_another_stage_or_place_is_found_and_no_task_gets_another_index(copied: Path) -> None:
    lists = copied / "tasks/classify"
    text = (copied / "study.toml").read_text()
    (copied / "study.toml").write_text(text + '[[arms]]\nname = "affine"\n')
    assert len(Workspace(copied).tasks("classify")) == 6
    assert sorted(os.listdir(lists)) == ["0001.json", "0002.json"]
    first, second = (lists / "0001.json").read_bytes(), (lists / "0002.json").read_bytes()
    for content, told in (
        ((copied / "tasks/refine/0001.json").read_bytes(), "it lists tasks of another stage"),
        (second, "an earlier list holds its tasks"),
        (None, "it is missing"),
    ):
        (lists / "0001.json").unlink() if content is None else (lists / "0001.json").write_bytes(content)
        (line,) = found(copied).damaged
        assert line.endswith(f"damaged task list: {told}")
        for verb in (("plan",), ("task", "--stage", "classify", "--index", "0")):
            done = cmrhpc(verb[0], copied, *verb[1:], check=False)
            assert done.returncode == 3
            assert told in done.stderr
    assert sorted(os.listdir(lists)) == ["0002.json"]
    (lists / "0001.json").write_bytes(first)
    assert found(copied).damaged == []


@needs_root
def test_a_workspace_that_cannot_be_written_is_read_all_the_same(copied: Path) -> None:
    text = (copied / "study.toml").read_text()
    (copied / "study.toml").write_text(text + '[[arms]]\nname = "affine"\n')

    def read_only(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        unshared = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(copied)]
        return subprocess.run([*unshared, *command(*arguments)], capture_output=True, text=True)

    done = read_only("verify", str(copied), "--json")
    assert (done.returncode, json.loads(done.stdout)["damaged"]) == (4, [])  # the report is out of date
    for verb in ("plan", "status"):
        done = read_only(verb, str(copied), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["stages"]["classify"]["missing"] == 2
    done = read_only("plan", str(copied), "--stage", "classify", "--array")  # an index that is sent must be fixed
    assert done.returncode == 3
    assert "cannot write: Read-only file system" in done.stderr
    assert os.listdir(copied / "tasks/classify") == ["0001.json"]
