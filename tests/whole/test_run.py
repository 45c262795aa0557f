"""A whole run: what the table says, that nothing leaks, and that finished work is not done again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score

from cmrhpc.launch.records import read_record
from cmrhpc.shards import read_shard
from tests.conftest import STUDY
from tests.reliability.damage import forge
from tests.whole.conftest import cmrhpc, make_workspace

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "submitit", "SimpleITK"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from cmrhpc.cli import main
"""

PREDICTION = "predictions/none/ratio0/resnet50/fold0_repeat0.h5"


def test_every_image_is_tested_once_per_repeat_and_no_patient_crosses(finished: Path) -> None:
    cohort = read_shard(finished / "cohort.h5")
    everyone = sorted(cohort.strings("id"))
    patient_of = dict(zip(cohort.strings("id"), cohort.strings("patient"), strict=True))
    for cell in sorted((finished / "predictions").glob("*/*/*")):
        tested: list[str] = []
        for path in sorted(cell.glob("*.h5")):
            shard = read_shard(path)
            tested += shard.strings("id")
            inside = {patient_of[i] for i in shard.strings("train_id") + shard.strings("validation_id")}
            assert not inside & set(shard.strings("patient"))
        assert sorted(tested) == everyone
    for path in [*(finished / "synthetic").rglob("*.h5"), *(finished / "refined").rglob("*.h5")]:
        shard = read_shard(path)
        test = read_shard(finished / "folds.h5").strings(f"repeat0_fold{shard.task['fold']}_test")
        assert not {patient_of[i] for i in shard.strings("train_id")} & {patient_of[i] for i in test}


def test_table_agrees_with_scikit_learn_and_with_its_own_identity(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "report" / "table.csv").open()))
    assert [(r["arm"], float(r["ratio"])) for r in rows] == [
        ("none", 0), ("affine", 0), ("dae-gan", 1), ("dae-gan", 2), ("dae-gan+simgan", 2),
    ]  # fmt: skip
    for row in rows:
        folder = finished / "predictions" / row["arm"] / f"ratio{float(row['ratio']):g}" / row["classifier"]
        shards = [read_shard(path) for path in sorted(folder.glob("*.h5"))]
        label = np.concatenate([s["label"] for s in shards])
        score = np.concatenate([s["score"] for s in shards])
        predicted = score.argmax(1)
        (tn, fp), (fn, tp) = confusion_matrix(label, predicted, labels=[0, 1])
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        constant = {sensitivity, specificity} <= {0.0, 1.0}
        expected = {
            "accuracy": (predicted == label).mean(),
            "sensitivity": sensitivity,
            "specificity": specificity,
            "balanced_accuracy": balanced_accuracy_score(label, predicted),
            "auc": roc_auc_score(label, score[:, 1]),
        }
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, abs=1e-12), name
            if constant and name in ("balanced_accuracy", "auc"):  # no patient right or wrong: no interval
                assert (row[f"{name}_low"] == "") == (row[f"{name}_high"] == "")
            else:
                assert float(row[f"{name}_low"]) <= value <= float(row[f"{name}_high"])
        prevalence = label.mean()
        assert float(row["accuracy"]) == pytest.approx(
            prevalence * sensitivity + (1 - prevalence) * specificity, abs=1e-12
        )
        assert (row["n_folds"], row["n_repeats"], row["n_missing"]) == ("2", "1", "0")


def test_arms_share_their_real_images_and_ratios_are_nested(finished: Path) -> None:
    def shard(arm: str, ratio: int) -> object:
        return read_shard(finished / f"predictions/{arm}/ratio{ratio}/resnet50/fold0_repeat0.h5")

    cells = [("none", 0), ("affine", 0), ("dae-gan", 1), ("dae-gan", 2), ("dae-gan+simgan", 2)]
    shards = [shard(arm, ratio) for arm, ratio in cells]
    assert len({tuple(s.strings("train_id")) for s in shards}) == 1
    n = len(shards[0].strings("train_id"))
    assert [s.attributes["n_train_added"] for s in shards] == [0, 0, n, 2 * n, 2 * n]


def test_a_finished_study_says_that_there_is_nothing_to_do(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    done = cmrhpc("run", finished)
    assert "nothing to do" in done.stdout
    assert done.stderr == ""
    crowded = cmrhpc("run", finished, "--jobs", 999)
    assert "nothing to do" in crowded.stdout
    assert "! --jobs 999 starts 999 threads" in crowded.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_only_what_is_missing_is_made_and_it_is_the_same(copied: Path) -> None:
    digest = cmrhpc("verify", copied).stdout.splitlines()[-1]
    assert digest.startswith("digest ")
    gone = copied / "refined/simgan/dae-gan/fold0_repeat0_class1.h5"
    gone.unlink()
    kept = {p: p.stat().st_ino for p in copied.rglob("*.h5")}
    states = json.loads(cmrhpc("plan", copied, "--json").stdout)["tasks"]
    assert {t["output"] for t in states if not t["done"]} == {
        "refined/simgan/dae-gan/fold0_repeat0_class1.h5",
        "predictions/dae-gan+simgan/ratio2/resnet50/fold0_repeat0.h5",
        "report/sources.json",
    }
    cmrhpc("run", copied)
    again = {p: p.stat().st_ino for p in copied.rglob("*.h5")}
    changed = {str(p.relative_to(copied)) for p in again if kept.get(p) != again[p]}
    # The same content comes back, so what was computed from it is valid again.
    assert changed == {"refined/simgan/dae-gan/fold0_repeat0_class1.h5"}
    assert cmrhpc("verify", copied).stdout.splitlines()[-1] == digest


def test_results_do_not_depend_on_order_or_on_how_tasks_are_started(finished: Path, tmp_path: Path) -> None:
    root = make_workspace(tmp_path / "other")
    for stage in ("ingest", "synthesize", "refine", "classify"):
        indices = [0] if stage == "ingest" else range(len(json.loads(_plan(root, stage))["tasks"]))
        for index in reversed(indices):
            cmrhpc("task", root, "--stage", stage, env=os.environ | {"SLURM_ARRAY_TASK_ID": str(index)})
    assert cmrhpc("verify", root).stdout.splitlines()[-1] == cmrhpc("verify", finished).stdout.splitlines()[-1]


def _plan(root: Path, stage: str) -> str:
    return cmrhpc("plan", root, "--stage", stage, "--json").stdout


def test_the_predictions_folder_alone_can_be_aggregated_without_torch(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "predictions", tmp_path / "predictions")
    code = f"{WITHOUT}sys.exit(main(['aggregate', {str(tmp_path)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report/table.csv").read_bytes() == (finished / "report/table.csv").read_bytes()


def test_a_failed_task_stops_only_what_needs_it(tmp_path: Path) -> None:
    text = STUDY.replace("[classifiers.resnet50]", '[classifiers.resnet50]\nweights = "none.safetensors"')
    root = make_workspace(tmp_path / "w", text)
    done = cmrhpc("run", root, check=False)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    # One failure of ten tasks is told once, with all of its message and where to read more.
    assert "10 tasks failed, 1 could not start" in done.stderr
    assert done.stderr.count("10 tasks: ") == 1
    for words in ("none.safetensors", "    mend:  ", "    log:   ", "logs/classify_0.log", "and 7 more"):
        assert words in done.stderr, done.stderr
    counts = json.loads(cmrhpc("status", root, "--json").stdout)["stages"]
    assert (counts["refine"]["done"], counts["classify"]["failed"]) == (4, 10)
    assert "none.safetensors" in cmrhpc("status", root).stdout


def missing(root: Path) -> int:
    """How many cells the table of the report lacks."""
    return sum(int(row["n_missing"]) for row in csv.DictReader((root / "report/table.csv").open()))


def test_a_report_of_a_part_is_made_again_once_a_run_has_made_the_rest(copied: Path) -> None:
    (copied / PREDICTION).unlink()
    assert cmrhpc("aggregate", copied, check=False).returncode == 4
    assert missing(copied) == 1
    cmrhpc("run", copied)
    assert missing(copied) == 0


def test_a_report_ends_with_one_exit_code_however_it_is_made(copied: Path, tmp_path: Path) -> None:
    report = ("task", copied, "--stage", "aggregate")
    (copied / PREDICTION).unlink()
    for verb in (report, ("aggregate", copied), report):  # also where the report is there already
        done = cmrhpc(*verb, check=False)
        assert (done.returncode, missing(copied)) == (4, 1)
        assert "1 of 10 predictions are missing" in done.stderr
    record = read_record(copied / "logs/aggregate_0.json")
    assert record is not None
    assert (record.state, "1 of 10 predictions are missing" in record.reason) == ("done", True)
    test = read_shard(copied / "folds.h5")["repeat0_fold1_test"]
    forge(copied, PREDICTION.replace("fold0", "fold1"), train_id=test[:2])
    for verb in (report, ("aggregate", copied), ("run", copied), ("run", copied)):
        done = cmrhpc(*verb, check=False)
        assert done.returncode == 5, done.stderr
        assert "leaks: patients are in training and in test" in done.stderr
    assert "nothing to do: all" in done.stdout  # of the second run
    shutil.rmtree(copied / "predictions")
    for verb in (report, ("aggregate", copied)):
        assert cmrhpc(*verb, check=False).returncode == 4
    assert cmrhpc("aggregate", tmp_path / "nowhere", check=False).returncode == 3


def test_a_task_tells_an_input_that_is_damaged_from_one_that_is_not_there(copied: Path) -> None:
    source, prediction = copied / "synthetic/dae-gan/fold0_repeat0_class1.h5", copied / "predictions/dae-gan"
    shutil.rmtree(prediction)
    names = [task["output"] for task in json.loads(_plan(copied, "classify"))["tasks"]]
    index = names.index("predictions/dae-gan/ratio1/resnet50/fold0_repeat0.h5")
    data = bytearray(source.read_bytes())
    data[-100] ^= 1
    source.write_bytes(data)
    done = cmrhpc("task", copied, "--stage", "classify", "--index", index, check=False)
    assert (done.returncode, "its input is damaged" in done.stderr) == (3, True), done.stderr
    source.unlink()
    done = cmrhpc("task", copied, "--stage", "classify", "--index", index, check=False)
    assert (done.returncode, "its input is not there" in done.stderr) == (4, True), done.stderr


def test_a_plan_names_a_changed_setting_once_for_all_folds(copied: Path) -> None:
    text = (copied / "study.toml").read_text()
    (copied / "study.toml").write_text(text.replace("generations = 4", "generations = 5"))
    lines = cmrhpc("plan", copied).stdout.splitlines()
    changed = "settings changed: generator.generations: 4 -> 5"
    assert f"synthesize: 4 {changed}" in lines
    assert f"refine: 4 input synthetic/dae-gan/*.h5 is to be made first ({changed})" in lines


def test_hours_that_are_left_come_from_what_done_tasks_took(copied: Path) -> None:
    shards = sorted(copied.glob("predictions/**/*.h5"))
    for path in shards[:3]:
        path.unlink()
    counts = json.loads(cmrhpc("status", copied, "--json").stdout)["stages"]["classify"]
    took = [float(h5py.File(path).attrs["seconds"]) for path in shards[3:]]
    assert counts["gpu_hours_from"] == "as 7 done tasks took"
    assert counts["gpu_hours_left"] == pytest.approx(3 * sum(took) / len(took) / 3600)


def test_jobs_and_commands_are_the_same_code(finished: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    root = make_workspace(tmp_path / "jobs")
    jobs = Path(__file__).parents[2] / "jobs"
    for stage, more in (("ingest", []), ("synthesize", ["--index", "0"])):
        subprocess.run([sys.executable, jobs / f"{stage}.py", root, *more], check=True, capture_output=True)
    name = "synthetic/dae-gan/fold0_repeat0_class0.h5"
    assert read_shard(root / name).content_sha256 == read_shard(finished / name).content_sha256
