"""Plan and workspace: frozen indices, what invalidates what, and the reason in words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cmrhpc import planning, shards, validity
from cmrhpc.errors import BadInput
from cmrhpc.launch.planned import array_ranges, offset_ranges
from cmrhpc.planning import STAGES, Task
from cmrhpc.study import parse_study
from cmrhpc.validity import Judge
from cmrhpc.workspace import Workspace
from tests.outputs import write_all, write_output


def make(root: Path, text: str) -> Workspace:
    root.mkdir(exist_ok=True)
    (root / "study.toml").write_text(text)
    return Workspace(root)


def missing(workspace: Workspace, check: bool = False) -> dict[str, str]:
    states = validity.states(workspace, STAGES[:-1], check)
    return {s.task.output: s.reason for stage in states for s in states[stage] if not s.done}


def test_everything_missing_then_everything_done(tmp_path: Path, study_text: str) -> None:
    workspace = make(tmp_path / "w", study_text)
    assert set(missing(workspace).values()) == {"missing"}
    write_all(workspace)
    assert missing(workspace) == {}
    (workspace.root / "index.json").unlink()
    assert missing(workspace, check=True) == {}


def test_adding_an_arm_invalidates_nothing_and_keeps_every_index(tmp_path: Path, study_text: str) -> None:
    workspace = make(tmp_path / "w", study_text)
    before = workspace.tasks("classify")
    write_all(workspace)
    grown = make(tmp_path / "w", study_text + '[[arms]]\nname = "repeat-real"\nratios = [2]\n')
    assert grown.tasks("classify")[: len(before)] == before
    assert set(missing(grown)) == {f"predictions/repeat-real/ratio2/resnet50/fold{f}_repeat0.h5" for f in (0, 1)}
    # Taking the arm away again leaves a list in which it keeps its place and is not wanted.
    shrunk = make(tmp_path / "w", study_text)
    assert len(shrunk.tasks("classify")) == len(before) + 2
    assert len(validity.states(shrunk, ("classify",))["classify"]) == len(before)
    # A further arm comes behind it.
    again = make(tmp_path / "w", study_text + '[[arms]]\nname = "dae-gan+affine"\n ratios = [1]\n')
    assert [t.arm for t in again.tasks("classify")[len(before) :]] == ["repeat-real"] * 2 + ["dae-gan+affine"] * 2


@pytest.mark.parametrize(
    ("old", "new", "reason", "stale"),
    [
        ("steps = 3", "steps = 4", "classifier.steps: 3 -> 4", ("predictions",)),
        ("generations = 4", "generations = 5", "generator.generations: 4 -> 5", ("synthetic", "refined", "dae-gan")),
        ("buffer = 8", "buffer = 9", "refiner.buffer: 8 -> 9", ("refined", "simgan")),
        ("factor = 2", "factor = 3", "affine.factor: 2 -> 3", ("synthetic", "refined", "affine", "dae-gan")),
        ("log_every = 1", "log_every = 2", "", ()),
        ("checkpoint_seconds = 600", "checkpoint_seconds = 9", "", ()),
        ("seed = 7", "seed = 8", "the study's seed changed", ("folds", "synthetic", "refined", "predictions")),
        ('raw = "raw"', 'raw = "elsewhere"', "", ()),
    ],
)
def test_a_changed_setting_invalidates_what_uses_it_and_says_so(
    tmp_path: Path, study_text: str, old: str, new: str, reason: str, stale: tuple[str, ...]
) -> None:
    write_all(make(tmp_path / "w", study_text))
    found = missing(make(tmp_path / "w", study_text.replace(old, new, 1)))
    everything = {t.output for stage in STAGES[:-1] for t in planning.tasks(parse_study(study_text), stage)}
    assert set(found) == {output for output in everything if any(word in output for word in stale)}
    assert any(reason in text for text in found.values()) or not found


def test_moves_that_a_refiner_alone_uses_concern_it_alone(tmp_path: Path, study_text: str) -> None:
    text = study_text.replace("[generators.dae-gan]", "[generators.dae-gan]\nexpand = false")
    text = text.replace("[refiners.simgan]", "[refiners.simgan]\nexpand = true")
    write_all(make(tmp_path / "w", text))
    found = missing(make(tmp_path / "w", text.replace("factor = 2", "factor = 3")))
    assert {path.split("/")[0] for path in found} == {"refined", "predictions"}


def test_a_shard_that_was_replaced_is_read_again(tmp_path: Path, study_text: str) -> None:
    """Same name, another file: what the index remembers of the old one does not count."""
    workspace = make(tmp_path / "w", study_text)
    write_all(workspace)
    assert missing(workspace) == {}
    task = planning.tasks(workspace.study, "synthesize")[0]
    other = make(tmp_path / "other", study_text.replace("seed = 7", "seed = 8"))
    write_all(other)
    os.replace(other.path(task.output), workspace.path(task.output))
    assert "seed" in missing(workspace)[task.output]


def test_a_changed_input_invalidates_what_reads_it(tmp_path: Path, study_text: str) -> None:
    workspace = make(tmp_path / "w", study_text)
    write_all(workspace)
    task = Task("synthesize", generator="dae-gan", fold=1, label=0)
    write_output(workspace, task, task.output, value=1.0)
    found = missing(workspace)
    assert set(found) == {
        "refined/simgan/dae-gan/fold1_repeat0_class0.h5",
        "predictions/dae-gan/ratio1/resnet50/fold1_repeat0.h5",
        "predictions/dae-gan/ratio2/resnet50/fold1_repeat0.h5",
        "predictions/dae-gan+simgan/ratio2/resnet50/fold1_repeat0.h5",
    }
    assert found["predictions/dae-gan/ratio1/resnet50/fold1_repeat0.h5"] == f"input {task.output} changed"


def test_swapped_and_foreign_shards_are_not_taken(tmp_path: Path, study_text: str) -> None:
    workspace = make(tmp_path / "w", study_text)
    write_all(workspace)
    a, b = (workspace.path(f"predictions/{arm}/ratio0/resnet50/fold0_repeat0.h5") for arm in ("none", "affine"))
    os.rename(a, a.with_name("aside"))
    os.rename(b, a)
    os.rename(a.with_name("aside"), b)
    assert len(missing(workspace)) == 2


def test_a_flipped_bit_is_found_when_files_are_checked(tmp_path: Path, study_text: str) -> None:
    workspace = make(tmp_path / "w", study_text)
    write_all(workspace)
    assert missing(workspace) == {}
    path = workspace.path("synthetic/dae-gan/fold0_repeat0_class0.h5")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as stream:  # in place: the same inode, so only the hash can tell
        stream.write(data)
    assert missing(workspace) == {}
    found = missing(workspace, check=True)
    assert found["synthetic/dae-gan/fold0_repeat0_class0.h5"].startswith("damaged")


@pytest.mark.parametrize("remade", ["by run", "by tasks"])
def test_what_lies_under_an_old_number_is_read_again(tmp_path: Path, study_text: str, remade: str) -> None:
    """As `rm -r synthetic` frees many numbers; a copy in place has the same one for certain."""
    workspace = make(tmp_path / "w", study_text)
    write_all(workspace)
    assert missing(workspace) == {}
    other = make(tmp_path / "other", study_text.replace("generations = 4", "generations = 5"))
    write_all(other)
    makers = [task for stage in ("synthesize", "refine", "classify") for task in planning.tasks(other.study, stage)]
    for task in makers:
        number = workspace.path(task.output).stat().st_ino
        workspace.path(task.output).write_bytes(other.path(task.output).read_bytes())
        assert workspace.path(task.output).stat().st_ino == number
    edited = make(tmp_path / "w", study_text.replace("generations = 4", "generations = 5"))
    if remade == "by run":
        validity.states(edited, check=True)  # what it looks at before it starts
    else:
        for task in makers:
            judge = Judge(edited, check=True)
            judge.reason(task)
            judge.correct_index([task.output])
    assert missing(edited) == {}
    again = missing(make(tmp_path / "w", study_text))
    assert again["synthetic/dae-gan/fold0_repeat0_class0.h5"] == "settings changed: generator.generations: 5 -> 4"


def test_shards_that_were_removed_are_forgotten_before_others_get_their_numbers(
    tmp_path: Path, study_text: str
) -> None:
    workspace = make(tmp_path / "w", study_text)
    write_all(workspace)
    assert missing(workspace) == {}
    shutil.rmtree(workspace.path("synthetic"))
    edited = make(tmp_path / "w", study_text.replace("generations = 4", "generations = 5"))
    validity.states(edited, check=True)  # what `run` looks at before it starts
    known = json.loads(edited.path("index.json").read_text())["shards"]
    assert "folds.h5" in known
    assert "synthetic/dae-gan/fold0_repeat0_class0.h5" not in known
    write_all(edited)
    assert missing(edited) == {}


def test_a_shard_that_a_network_file_system_does_not_show_yet_is_looked_for_again(
    tmp_path: Path, study_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown once its folder has been opened anew."""
    workspace = make(tmp_path, study_text)
    write_all(workspace)
    task = workspace.tasks("refine")[0]
    late, opened, damage_of = workspace.path(task.output), [], shards.damage_of
    monkeypatch.setattr(shards, "damage_of", lambda path: "missing" if path == late and not opened else damage_of(path))
    real = os.open

    def noted(path: object, *more: object, **named: object) -> int:
        opened.extend([1] if path == late.parent else [])
        return real(path, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", noted)
    assert not Judge(workspace, check=True).verdict(task.output)
    assert opened == [1]


def test_two_planners_at_once_freeze_one_list(tmp_path: Path, study_text: str) -> None:
    first, second = make(tmp_path / "w", study_text), Workspace(tmp_path / "w")
    assert first.tasks("classify") == second.tasks("classify") == Workspace(tmp_path / "w").tasks("classify")
    assert os.listdir(tmp_path / "w" / "tasks" / "classify") == ["0001.json"]


def test_a_damaged_task_list_is_bad_input(tmp_path: Path, study_text: str) -> None:
    workspace = make(tmp_path / "w", study_text)
    workspace.tasks("classify")
    (workspace.root / "tasks" / "classify" / "0001.json").write_text('[{"stage": "nonsense"}]')
    with pytest.raises(BadInput, match="task list"):
        workspace.tasks("classify")


def test_seeds_pair_the_arms_and_differ_elsewhere(study_text: str) -> None:
    study = parse_study(study_text)
    seeds = {(t.arm, t.ratio, t.fold): planning.seed(study, t) for t in planning.tasks(study, "classify")}
    for fold in (0, 1):
        assert len({s for (_, _, f), s in seeds.items() if f == fold}) == 1
    assert len(set(seeds.values())) == 2
    makers = planning.tasks(study, "synthesize") + planning.tasks(study, "refine")
    assert len({planning.seed(study, t) for t in makers}) == len(makers)
    assert {t.label for t in makers} == {0, 1}


def test_array_ranges() -> None:
    assert array_ranges([0, 1, 2, 5, 7, 8]) == ["0-2,5,7-8"]
    assert array_ranges(list(range(10)), 4) == ["0-3", "4-7", "8-9"]
    assert array_ranges([]) == []


def test_ranges_with_an_offset_hold_every_task_once_and_no_high_index() -> None:
    assert offset_ranges([0, 1, 7, 8, 9], 4) == ["0-1 0", "3 4", "0-1 8"]
    assert offset_ranges(list(range(1050)), 1001) == ["0-1000 0", "0-48 1001"]
    assert offset_ranges([], 4) == []


def test_a_ratio_asks_for_the_product_rounded_up_and_for_no_image_more() -> None:
    for tenths in range(1001):
        for n_real in (1, 7, 50, 221, 1000):
            exact = -(-tenths * n_real // 10)
            assert planning.images_wanted(tenths / 10, n_real) == exact
    assert planning.images_wanted(1 / 3, 10) == 4
