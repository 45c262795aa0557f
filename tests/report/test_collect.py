"""What is collected, what is missing, what is refused and why."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cmrhpc import planning, shards
from cmrhpc.errors import BadInput
from cmrhpc.hashing import canonical
from cmrhpc.report import csvfiles
from cmrhpc.report.aggregate import aggregate
from cmrhpc.report.collect import collect
from cmrhpc.report.result import evaluate
from cmrhpc.report.tables import table_md
from cmrhpc.study import parse_study
from tests.report import made


@pytest.fixture
def study():
    return made.study()


@pytest.fixture
def one(study):
    return made.cohort(study)


@pytest.fixture
def scores(one):
    return made.noisy_scores(one.label, 2, {})


def task_of(study, arm="dae-gan", ratio=3.0, fold=1, repeat=0):
    found = [
        t for t in planning.tasks(study, "classify") if (t.arm, t.ratio, t.fold, t.repeat) == (arm, ratio, fold, repeat)
    ]
    return found[0]


def test_every_cell_is_found_and_every_image_tested_once_per_repeat(tmp_path: Path, study, one, scores) -> None:
    tasks = made.write(tmp_path, study, one, scores)
    found = collect(tmp_path)
    assert found.study == study
    assert (found.missing, found.refused, found.unasked, found.leaks, found.unchecked_ids) == ({}, {}, [], [], 0)
    assert sum(len(row) for row in found.cells.values()) == len(tasks) == 4 * 6
    assert [i.decode() for i in found.ids.tolist()] == one.ids.tolist()
    assert found.image_label.tolist() == one.label.tolist()
    for row in found.cells.values():
        for repeat in range(2):
            rows = np.concatenate([cell.images.row for (r, _), cell in row.items() if r == repeat])
            assert sorted(rows.tolist()) == list(range(len(one.ids)))
    assert found.patients_per_class() == [
        (name, patients, int((one.label == i).sum()))
        for i, (name, patients) in enumerate((("normal", 9), ("disease", 15)))
    ]


def test_missing_cells_are_named(tmp_path: Path, study, one, scores) -> None:
    gone = task_of(study)
    made.write(tmp_path, study, one, scores, skip=lambda task: task == gone)
    assert collect(tmp_path).missing == {gone.output: "not computed"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "another seed"),
        ({"settings": {"other": 1}}, "other settings"),
        ({"task": {"stage": "classify"}}, "another task"),
        ({"attributes": {"classes": ["a", "b"]}}, "its classes are"),
        ({"schema": "images-1"}, "a shard of schema"),
        ({"inputs": {"cohort.h5": "d" * 64, "folds.h5": "b" * 64}}, "made from another cohort.h5"),
    ],
)
def test_a_foreign_shard_is_refused_and_its_cell_missing(
    tmp_path: Path, study, one, scores, changes, says: str
) -> None:
    task = task_of(study, "none", 0.0)
    (tmp_path / "study.toml").write_text(made.toml())
    made.write_one(tmp_path, study, task, made.datasets(one, task, scores), **changes)
    made.write(tmp_path, study, one, scores, skip=lambda other: other == task)
    found = collect(tmp_path)
    assert says in found.missing[task.output]
    assert list(found.missing) == list(found.refused) == [task.output]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["score"].__setitem__((0, 1), np.nan), "not finite"),
        (lambda data: data["label"].__setitem__(0, 7), "labels outside"),
        (lambda data: data["id"].__setitem__(0, data["id"][1]), "tests an image twice"),
        (lambda data: data.pop("train_id"), "lacks train_id"),
        (lambda data: data.__setitem__("label", data["label"].astype(float)), "label has the wrong type"),
        (lambda data: data.__setitem__("id", data["id"][:, None]), "id has the wrong type or shape"),
        (lambda data: data.__setitem__("score", np.c_[data["score"], data["score"]]), "scores of 4 classes"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, study, one, scores, change, says: str) -> None:
    task = task_of(study)
    made.write(tmp_path, study, one, scores, skip=lambda other: other == task)
    data = made.datasets(one, task, scores)
    change(data)
    made.write_one(tmp_path, study, task, data)
    assert says in collect(tmp_path).missing[task.output]


def test_damaged_and_misplaced_files_are_refused(tmp_path: Path, study, one, scores) -> None:
    made.write(tmp_path, study, one, scores)
    flipped, moved = tmp_path / task_of(study, fold=0).output, tmp_path / task_of(study, fold=2).output
    raw = bytearray(flipped.read_bytes())
    raw[-9] ^= 4
    flipped.write_bytes(raw)
    shutil.copy(tmp_path / task_of(study, "none", 0.0).output, moved)
    found = collect(tmp_path)
    assert "checksum" in found.missing[task_of(study, fold=0).output]
    assert "another task" in found.missing[task_of(study, fold=2).output]


def test_links_and_temporary_files_are_not_read(tmp_path: Path, study, one, scores) -> None:
    made.write(tmp_path, study, one, scores, skip=lambda t: t.fold == 2)
    source, target = tmp_path / task_of(study, fold=0).output, tmp_path / task_of(study, fold=2).output
    target.symlink_to(source)
    (target.parent / ".fold1_repeat1.h5.tmp.host.1.2").write_bytes(b"half")
    assert collect(tmp_path).missing[task_of(study, fold=2).output] == "not computed"


def test_shards_that_the_study_no_longer_asks_for_are_left_out(tmp_path: Path, study, one, scores) -> None:
    made.write(tmp_path, study, one, scores)
    (tmp_path / "study.toml").write_text(made.toml(arms="none dae-gan:3"))
    found = collect(tmp_path)
    assert len(found.unasked) == 12
    assert found.missing == {}
    assert found.study_from == "study.toml"


def test_without_a_study_file_the_newest_shard_tells_the_study(tmp_path: Path, one, scores, monkeypatch) -> None:
    old, new = made.study(arms="none dae-gan:3"), made.study()
    made.write(tmp_path, old, one, scores)
    monkeypatch.setattr(shards.time, "strftime", lambda *a: "2999-01-01T00:00:00Z")
    task = task_of(new, "affine", 0.0)
    made.write_one(tmp_path, new, task, made.datasets(one, task, scores))
    found = collect(tmp_path)
    assert found.study == new
    assert len(found.missing) == 4 * 6 - 13
    assert task.output in found.study_from


def test_a_copied_predictions_folder_alone_gives_the_same_tables(tmp_path: Path, study, one, scores) -> None:
    made.write(tmp_path / "ws", study, one, scores)
    (tmp_path / "ws" / "study.toml").write_text(made.toml())
    whole = evaluate(collect(tmp_path / "ws"))
    for name in ("predictions", "renamed"):
        copy = tmp_path / "elsewhere" / name
        shutil.copytree(tmp_path / "ws" / "predictions", copy)
        alone = evaluate(collect(copy))
        for table in (
            csvfiles.table_csv,
            csvfiles.comparisons_csv,
            csvfiles.folds_csv,
            csvfiles.patients_csv,
            table_md,
        ):
            assert table(alone) == table(whole)
    assert aggregate(copy).folder == copy / "report"


def test_two_cohorts_in_one_folder_are_bad_input(tmp_path: Path, study, one, scores) -> None:
    task = task_of(study)
    made.write(tmp_path, study, one, scores, skip=lambda other: other == task)
    one.patient[np.flatnonzero(one.split[0, 1][2])[0]] = "p9999"
    made.write_one(tmp_path, study, task, made.datasets(one, task, scores))
    with pytest.raises(BadInput, match="disagree about the patient or class of image r0"):
        collect(tmp_path)


def test_folds_of_two_splits_are_bad_input(tmp_path: Path, study, one, scores) -> None:
    made.write(tmp_path, study, one, scores, skip=lambda t: (t.fold, t.repeat) == (1, 0))
    one.split[0, 1] = one.split[0, 2]
    made.write_one(tmp_path, study, task_of(study), made.datasets(one, task_of(study), scores))
    with pytest.raises(BadInput, match="two folds test the same image"):
        collect(tmp_path)


@pytest.mark.parametrize("what", ["nothing", "empty", "damaged", "other study"])
def test_no_usable_prediction_is_bad_input(tmp_path: Path, study, one, scores, what: str) -> None:
    folder = tmp_path / "ws"
    if what != "nothing":
        (folder / "predictions").mkdir(parents=True)
    if what == "damaged":
        path = folder / task_of(study).output
        path.parent.mkdir(parents=True)
        path.write_bytes(b"nonsense")
    if what == "other study":
        made.write(folder, study, one, scores, skip=lambda t: t.arm != "none")
        (folder / "study.toml").write_text(made.toml(seed=99))
    with pytest.raises(BadInput, match="no such folder" if what == "nothing" else "no prediction"):
        collect(folder)


def test_a_workspace_with_refined_images_and_no_prediction_is_told_so(tmp_path: Path, study) -> None:
    (tmp_path / "study.toml").write_text("")
    shard = tmp_path / "refined/simgan/dae-gan/fold0_repeat0_class0.h5"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"images")
    with pytest.raises(BadInput) as raised:
        collect(tmp_path)
    assert "no prediction to aggregate (no shard found)" in str(raised.value)
    assert "refined" not in raised.value.what


def test_leaks_are_found_by_image_and_by_patient(tmp_path: Path, study, one, scores) -> None:
    train, _, test = one.split[1, 2]
    leaking = np.flatnonzero(test)[:1]
    patient = one.patient[leaking[0]]
    train[leaking] = True
    made.write(tmp_path, study, one, scores)
    found = collect(tmp_path)
    assert found.leaks == [
        "repeat 1 fold 2: 1 test image in train (4 shards)",
        f"repeat 1 fold 2: 1 test patient in train: {patient} (4 shards)",
    ]


def test_a_test_patient_in_validation_alone_is_a_leak(tmp_path: Path, study, one, scores) -> None:
    _, validation, test = one.split[0, 1]
    leaking = np.flatnonzero(test)[:1]
    validation[leaking] = True
    made.write(tmp_path, study, one, scores)
    assert collect(tmp_path).leaks == [
        "repeat 0 fold 1: 1 test image in validation (4 shards)",
        f"repeat 0 fold 1: 1 test patient in validation: {one.patient[leaking[0]]} (4 shards)",
    ]


def write_made(root: Path, study, one, inputs: dict[str, str], leaking: tuple[int, int] | None) -> None:
    """Synthetic and refined shards of a whole workspace; in `leaking`, a (repeat, fold), trained on a test image."""
    for task in (t for stage in ("synthesize", "refine") for t in planning.tasks(study, stage)):
        train, _, test = one.split[task.repeat, task.fold]
        rows = np.flatnonzero(train)
        if task.stage == "synthesize" and (task.repeat, task.fold) == leaking:
            rows = np.r_[rows, np.flatnonzero(test)[:1]]
        inputs[task.output] = shards.write_shard(
            root / task.output,
            {
                "image": np.zeros((2, 1, 16, 16), np.float32),
                "label": np.zeros(2, np.int64),
                "train_id": shards.text_array(one.ids[rows].tolist()),
            },
            schema="images-1",
            task=task.to_json(),
            settings=planning.settings(study, task),
            inputs={p: inputs.get(p, made.HASHES.get(p)) for p in planning.inputs(study, task)},
            seed=planning.seed(study, task),
        )


def test_a_generator_trained_on_test_patients_is_found_where_its_shard_is_at_hand(tmp_path: Path) -> None:
    """Only the synthetic shards behind refined ones leak: the predictions' own training ids are clean."""
    text = made.toml(arms="none dae-gan+simgan:3", primary='arm = "dae-gan+simgan"\nratio = 3')
    study = parse_study(text)
    one = made.cohort(study)
    inputs: dict[str, str] = {}
    (tmp_path / "study.toml").write_text(text)
    write_made(tmp_path, study, one, inputs, leaking=(1, 2))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}), inputs=inputs)
    result = aggregate(tmp_path)
    patient = one.patient[np.flatnonzero(one.split[1, 2][2])[0]]
    part = "the training of a generator or refiner"
    assert result.result.collection.leaks == [
        f"repeat 1 fold 2: 1 test image in {part} (2 shards)",
        f"repeat 1 fold 2: 1 test patient in {part}: {patient} (2 shards)",
    ]
    assert "No leak found" not in (result.folder / "index.html").read_text()


def test_the_page_says_which_generators_were_looked_at(tmp_path: Path) -> None:
    text = made.toml(arms="none dae-gan:3")
    study = parse_study(text)
    one = made.cohort(study)
    inputs: dict[str, str] = {}
    (tmp_path / "study.toml").write_text(text)
    write_made(tmp_path, study, one, inputs, leaking=None)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}), inputs=inputs)
    page = (aggregate(tmp_path).folder / "index.html").read_text()
    assert "No leak found." in page
    assert "Copies of real images among the made ones were not looked for here: cmrhpc verify does that." in page
    assert "So were those of the 12 synthetic or refined shards from which these predictions were made." in page
    alone = (aggregate(tmp_path / "predictions").folder / "index.html").read_text()
    assert "So were those of the 12" in alone  # the folder lies in its workspace
    shutil.copytree(tmp_path / "predictions", tmp_path / "copy", ignore=shutil.ignore_patterns("report"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.time, "sleep", lambda seconds: pytest.fail("waits for shards that are not at hand"))
        copied = (aggregate(tmp_path / "copy").folder / "index.html").read_text()
    assert "No leak found in the predictions." in copied
    assert "not checked here for 12 synthetic or refined shards not at hand: run cmrhpc verify" in copied


@pytest.mark.parametrize("alone", [True, False])
def test_a_primary_changed_after_predictions_were_made_is_no_longer_called_declared(tmp_path: Path, alone) -> None:
    text = made.toml(arms="none dae-gan:1,3", primary='arm = "dae-gan"\nratio = 3')
    study = parse_study(text)
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    declared = "Declared before the study ran"
    assert declared in (aggregate(tmp_path).folder / "index.html").read_text()
    changed = text.replace("ratio = 3\n", 'ratio = 1\nmetric = "auc"\n')
    now = parse_study(changed)
    if alone:  # no study.toml: the newest shard tells the study
        task = planning.tasks(now, "classify")[0]
        info = {"study": canonical(now.to_json()), "written": "2999-01-01T00:00:00Z"}
        (tmp_path / task.output).unlink()  # one of the same content would stay as it is
        made.write_one(tmp_path, now, task, made.datasets(one, task, made.noisy_scores(one.label, 2, {})), info=info)
    else:
        (tmp_path / "study.toml").write_text(changed)
    result = aggregate(tmp_path)
    n = 17 if alone else 18
    assert any(
        f"changed after {n} of 18 predictions were made; it was dae-gan at ratio 3 against none, accuracy of resnet50."
        in warning
        for warning in result.result.warnings
    )
    assert "AUC of resnet50" in result.result.question
    for text in ((result.folder / "index.html").read_text(), (tmp_path / "report" / "table.md").read_text()):
        assert declared not in text
        assert "the primary, was declared" not in text
        assert "was not declared before the study ran" in text


def test_arms_that_started_from_different_weights_are_not_compared(tmp_path: Path, one, scores) -> None:
    """none was trained before the file of weights changed; xception starts from random ones and is no part of it."""
    study = made.study(arms="none dae-gan:3", classifiers="resnet50 xception")
    for task in planning.tasks(study, "classify"):
        old = task.arm == "none"
        weights = {"weights": ("d" if old else "e") * 64} if task.classifier == "resnet50" else {}
        info = {"study": canonical(study.to_json()), "written": f"20{25 + (not old)}-01-01T00:00:00Z"}
        made.write_one(tmp_path, study, task, made.datasets(one, task, scores), inputs=weights, info=info)
    result = aggregate(tmp_path)
    missing = result.result.collection.missing
    assert set(missing.values()) == {"it was trained from other start weights"}
    stale = [t.output for t in planning.tasks(study, "classify") if (t.arm, t.classifier) == ("none", "resnet50")]
    assert sorted(missing) == sorted(stale)
    page = (result.folder / "index.html").read_text()
    assert f"<dt>start weights of resnet50</dt><dd>{'e' * 64}</dd>" in page
    assert "start weights of xception" not in page


def test_training_ids_that_no_shard_tests_are_counted(tmp_path: Path, study, one, scores) -> None:
    made.write(tmp_path, study, one, scores, skip=lambda t: t.fold == 0)
    never_tested = set(one.ids[one.split[0, 0][2]]) & set(one.ids[one.split[1, 0][2]])
    assert collect(tmp_path).unchecked_ids == len(never_tested) > 0


def test_a_changed_synthetic_shard_makes_its_predictions_stale(tmp_path: Path, study, one, scores) -> None:
    """In a workspace the inputs are at hand; in a copied predictions folder they are not and cannot be compared."""
    (tmp_path / "study.toml").write_text(made.toml())
    made.write(tmp_path, study, one, scores)
    assert collect(tmp_path).missing == {}
    synthetic = next(t for t in planning.tasks(study, "synthesize") if (t.fold, t.repeat, t.label) == (1, 0, 0))
    inputs = {path: made.HASHES[path] for path in planning.inputs(study, synthetic)}
    common = {
        "schema": "images-1",
        "task": synthetic.to_json(),
        "inputs": inputs,
        "seed": planning.seed(study, synthetic),
    }
    data = {"image": np.zeros((2, 1, 16, 16), np.float32), "label": np.zeros(2, np.int64)}
    content = shards.write_shard(
        tmp_path / synthetic.output, data, settings=planning.settings(study, synthetic), **common
    )
    stale = collect(tmp_path).missing
    assert {path.split("/")[1] for path in stale} == {"dae-gan"}
    assert all(reason == f"it was made from another {synthetic.output}" for reason in stale.values())
    assert len(stale) == 2
    for task in (t for t in planning.tasks(study, "classify") if t.output in stale):
        made.write_one(tmp_path, study, task, made.datasets(one, task, scores), inputs={synthetic.output: content})
    assert collect(tmp_path).missing == {}
    data["image"] += 1
    shards.write_shard(tmp_path / synthetic.output, data, settings={"other": 1}, **common)
    assert len(collect(tmp_path).missing) == 2


def test_shards_read_side_by_side_give_the_same_report(
    tmp_path: Path, study, one, scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = made.write(tmp_path, study, one, scores)
    (tmp_path / tasks[3].output).write_bytes(b"damaged")
    alone = collect(tmp_path)
    monkeypatch.setattr("cmrhpc.forked.LEAST", 1)
    monkeypatch.setattr("cmrhpc.forked._processes", lambda: 2)
    both = collect(tmp_path)
    assert both.refused == alone.refused
    assert len(both.refused) == 1
    assert table_md(evaluate(both)) == table_md(evaluate(alone))
