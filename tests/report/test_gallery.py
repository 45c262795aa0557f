"""What a whole workspace adds: sample strips, kernel distances and training curves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cmrhpc import planning, shards
from cmrhpc.measure.kernel_distance import kernel_distance
from cmrhpc.report import figures
from cmrhpc.report.aggregate import aggregate
from cmrhpc.report.collect import collect
from cmrhpc.report.gallery import make_gallery
from tests.report import made

ARMS = "none acgan:3 dae-gan:3 dae-gan+simgan:3"


def log_lines() -> bytes:
    lines = [
        {
            "step": step,
            "loss_d": 0.7,
            "loss_g": {"minimax": -0.3, "heuristic": 0.6},
            "f_q_spread": 0.2,
            "gamma_f_d_spread": 0.1,
            "wins": {"minimax": step // 3, "heuristic": step - step // 3},
        }
        for step in range(50, 301, 50)
    ]
    lines[2]["warning"] = "one mutation wins <nearly> always"
    return "".join(json.dumps(line) + "\n" for line in lines).encode() + b"not json\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of 20 x 20 images: real ones are noisy discs, synthetic ones their means, refined ones sharper."""
    root = tmp_path_factory.mktemp("ws")
    (root / "study.toml").write_text(made.toml(arms=ARMS))
    study = made.study(arms=ARMS)
    one = made.cohort(study)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20] - 9.5
    radius = 5 + 2 * one.label + rng.normal(0, 0.5, len(one.ids))
    images = np.where(np.hypot(y, x) < radius[:, None, None], 0.7, -0.7) + rng.normal(0, 0.15, (len(one.ids), 20, 20))
    images = np.clip(images, -1, 1).astype(np.float32)[:, None]
    ids = shards.text_array(one.ids.tolist())
    cohort = {
        "image": images,
        "label": one.label.astype(np.int64),
        "patient": shards.text_array(one.patient.tolist()),
        "id": ids,
    }
    content = {}
    for name, data, schema in (
        ("cohort.h5", cohort, "cohort-1"),
        (
            "folds.h5",
            {
                f"repeat{r}_fold{f}_{part}": ids[mask]
                for (r, f), masks in one.split.items()
                for part, mask in zip(("train", "validation", "test"), masks, strict=True)
            },
            "folds-1",
        ),
    ):
        task = planning.Task("ingest")
        content[name] = shards.write_shard(
            root / name,
            data,
            schema=schema,
            task=task.to_json(),
            settings=planning.settings(study, task, name),
            inputs={},
            seed=0,
        )
    for task in planning.tasks(study, "synthesize") + planning.tasks(study, "refine"):
        train = one.split[task.repeat, task.fold][0]
        parts, labels = [], []
        for label in (0, 1) if task.label is None else (task.label,):
            real = images[train & (one.label == label)]
            blend = (real + np.roll(real, 1, axis=0)) / 2
            parts.append(np.concatenate([blend] * 3) if task.stage == "synthesize" else np.concatenate([real] * 3))
            labels.append(np.full(len(parts[-1]), label, np.int64))
        data = {"image": np.concatenate(parts), "label": np.concatenate(labels), "train_id": ids[train]}
        if task.stage == "synthesize":
            data["untrained"] = rng.normal(0, 0.05, (12, 1, 20, 20)).astype(np.float32)
        content[task.output] = shards.write_shard(
            root / task.output,
            data,
            schema="images-1",
            task=task.to_json(),
            settings=planning.settings(study, task),
            inputs={path: content[path] for path in planning.inputs(study, task)},
            seed=planning.seed(study, task),
            companions={".jsonl": log_lines()},
        )
    made.write(root, study, one, made.noisy_scores(one.label, 2, {}), inputs=content)
    return root


def test_distances_are_those_of_the_images_in_the_shards(workspace: Path) -> None:
    collection = collect(workspace)
    assert collection.missing == {}
    gallery = make_gallery(collection)
    assert gallery.notes == []
    found = {(d.generator, d.fold, d.label): d for d in gallery.distances}
    assert set(found) == {(g, f, c) for g in ("acgan", "dae-gan") for f in range(3) for c in (0, 1)}
    cohort, folds = shards.read_shard(workspace / "cohort.h5"), shards.read_shard(workspace / "folds.h5")
    synthetic = shards.read_shard(workspace / "synthetic/dae-gan/fold1_repeat0_class1.h5")
    refined = shards.read_shard(workspace / "refined/simgan/dae-gan/fold1_repeat0_class1.h5")
    ids, label = cohort["id"], cohort["label"]
    held_out, train = (
        cohort["image"][np.isin(ids, folds[f"repeat0_fold1_{part}"]) & (label == 1)] for part in ("test", "train")
    )
    one = found["dae-gan", 1, 1]
    assert one.n_held_out == len(held_out)
    assert one.trained == pytest.approx(kernel_distance(synthetic["image"], held_out), abs=1e-9)
    assert one.untrained == pytest.approx(kernel_distance(synthetic["untrained"], held_out), abs=1e-9)
    assert one.refined == {"simgan": pytest.approx(kernel_distance(refined["image"], held_out), abs=1e-9)}
    assert one.floor == pytest.approx(kernel_distance(train, held_out), abs=1e-9)
    assert one.untrained > 5 * one.trained
    # One file holds all classes of a conditional generator: each class is measured on its own images.
    both = shards.read_shard(workspace / "synthetic/acgan/fold0_repeat0_classes.h5")
    test = cohort["image"][np.isin(ids, folds["repeat0_fold0_test"]) & (label == 1)]
    expected = kernel_distance(both["image"][both["label"] == 1], test)
    assert found["acgan", 0, 1].trained == pytest.approx(expected, abs=1e-9)
    expected = kernel_distance(both["untrained"][1::2], test)
    assert found["acgan", 0, 1].untrained == pytest.approx(expected, abs=1e-9)


def test_no_figure_of_an_earlier_report_stays(workspace: Path, tmp_path: Path) -> None:
    figures = tmp_path / "out/figures"
    figures.mkdir(parents=True)
    old = ("specificity.png", "folds_auc.png", "ratio_curve_auc.png", "samples_egan_class0.png", "training_egan.png")
    others = ("notes.txt", "mine.png", "auc_mine.png")
    for name in (*old, *others):
        (figures / name).write_text("old")
    written = set(aggregate(workspace, tmp_path / "out").files)
    there = {path.name for path in figures.iterdir()}
    assert there == {Path(name).name for name in written if name.startswith("figures/")} | set(others)


def test_page_shows_strips_distances_curves_and_warnings(workspace: Path) -> None:
    result = aggregate(workspace)
    page = result.page.read_text()
    kinds = ("real", "acgan", "dae-gan", "dae-gan_simgan")
    strips = {f"samples_{kind}_class{label}.png" for kind in kinds for label in (0, 1)}
    curves = {f"training_{part}.png" for part in ("acgan_classes", "dae-gan_class0", "simgan_dae-gan_class1")}
    assert strips | curves <= {path.name for path in (result.folder / "figures").glob("*.png")}
    for kind in ("real, training images of fold 0", "synthetic, dae-gan", "refined, dae-gan by simgan"):
        assert re.search(rf"<figcaption>[^<]+: {kind}, \d+ images</figcaption>", page), kind
    assert "refined (simgan)" in page
    assert "Warnings while training" in page
    assert "one mutation wins &lt;nearly&gt; always" in page


def test_predictions_alone_give_an_empty_gallery(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "predictions").symlink_to(workspace / "predictions")
    gallery = make_gallery(collect(tmp_path))
    assert (gallery.strips, gallery.distances, gallery.curves, gallery.notes) == ([], [], {}, [])


def test_a_changed_log_and_a_stale_shard_are_left_out(workspace: Path) -> None:
    log = workspace / "synthetic/dae-gan/fold0_repeat0_class0.jsonl"
    shard = workspace / "synthetic/dae-gan/fold1_repeat0_class0.h5"
    kept = log.read_bytes(), shard.read_bytes()
    try:
        log.write_bytes(kept[0] + b"{}\n")
        shard.write_bytes(kept[1][:-1])
        gallery = make_gallery(collect(workspace))
    finally:
        log.write_bytes(kept[0])
        shard.write_bytes(kept[1])
    assert "training_dae-gan_class0.png" not in gallery.curves
    assert "training_dae-gan_class1.png" in gallery.curves
    assert ("dae-gan", 1, 0) not in {(d.generator, d.fold, d.label) for d in gallery.distances}
    assert any("checksum" in note for note in gallery.notes)


def test_wins_so_far_become_shares_of_each_window() -> None:
    won = {"a": ([50.0, 100.0, 150.0], [10.0, 40.0, 40.0]), "b": ([50.0, 100.0, 150.0], [40.0, 60.0, 110.0])}
    np.testing.assert_allclose(figures._window_shares(won), [[20, 60, 0], [80, 40, 100]])
