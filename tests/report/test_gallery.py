"""What a whole workspace adds: sample strips, kernel distances and training curves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cmrhpc import planning, shards
from cmrhpc.measure.kernel_distance import feature_distance, features, turned
from cmrhpc.report import figures
from cmrhpc.report.aggregate import aggregate, terminal_table
from cmrhpc.report.collect import collect
from cmrhpc.report.gallery import is_expanded, make_gallery
from cmrhpc.study import parse_study
from cmrhpc.train.affine import expand
from tests.report import made
from tests.report.made import visible_text

ARMS = "none acgan:3 dae-gan:3 dae-gan+simgan:3"


def log_lines(task: planning.Task) -> bytes:
    """All trainings of class 0 warn, and in fold 2 of repeat 1 acgan, which has no class."""
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
    if task.label == 0 or (task.generator, task.fold, task.repeat) == ("acgan", 2, 1):
        lines[2]["warning"] = f"one mutation wins <nearly> always (9{task.fold} %)"
    if task.refiner and task.label == 0 and task.fold == 1:
        lines[3]["warning"] = "a loss is odd; one mutation wins <nearly> always (99 %)"
    return "".join(json.dumps(line) + "\n" for line in lines).encode() + b"not json\n"


def write_workspace(
    root: Path, text: str, one: made.Cohort, images: np.ndarray, make: Callable[[planning.Task, np.ndarray], np.ndarray]
) -> None:
    """A whole workspace: real `images` (N, 1, H, W) of a cohort; make(task, train images of the class) -> made ones."""
    (root / "study.toml").write_text(text)
    study, rng = parse_study(text), np.random.default_rng(0)
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
            parts.append(make(task, images[train & (one.label == label)]))
            labels.append(np.full(len(parts[-1]), label, np.int64))
        data = {"image": np.concatenate(parts), "label": np.concatenate(labels), "train_id": ids[train]}
        if task.stage == "synthesize":
            data["untrained"] = rng.normal(0, 0.05, (12, *images.shape[1:])).astype(np.float32)
        content[task.output] = shards.write_shard(
            root / task.output,
            data,
            schema="images-1",
            task=task.to_json(),
            settings=planning.settings(study, task),
            inputs={path: content[path] for path in planning.inputs(study, task)},
            seed=planning.seed(study, task),
            companions={".jsonl": log_lines(task)},
        )
    made.write(root, study, one, made.noisy_scores(one.label, 2, {}), inputs=content)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of 20 x 20 images: real ones are noisy discs, synthetic ones their means, refined ones sharper.

    acgan is trained on the expanded set, dae-gan on the images as they are.
    """
    root = tmp_path_factory.mktemp("ws")
    text = made.toml(arms=ARMS).replace("[generators.dae-gan]", "[generators.dae-gan]\nexpand = false")
    one = made.cohort(parse_study(text))
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20] - 9.5
    radius = 5 + 2 * one.label + rng.normal(0, 0.5, len(one.ids))
    images = np.where(np.hypot(y, x) < radius[:, None, None], 0.7, -0.7) + rng.normal(0, 0.15, (len(one.ids), 20, 20))

    def make(task: planning.Task, real: np.ndarray) -> np.ndarray:
        blend = (real + np.roll(real, 1, axis=0)) / 2
        return np.concatenate([blend if task.stage == "synthesize" else real] * 3)

    write_workspace(root, text, one, np.clip(images, -1, 1).astype(np.float32)[:, None], make)
    return root


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    return feature_distance(features(a), features(b))


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
    # One file holds all classes of a conditional generator: each class is measured on its own images. It learnt from
    # the expanded set, so the held-out images are turned and mirrored, in as many draws as make 300 images at most.
    both = shards.read_shard(workspace / "synthetic/acgan/fold0_repeat0_classes.h5")
    test = cohort["image"][np.isin(ids, folds["repeat0_fold0_test"]) & (label == 1)]
    rng = np.random.default_rng(1)
    draws = [turned(test, rng) for _ in range(min(8, 300 // len(test)))]
    one = found["acgan", 0, 1]
    assert one.n_held_out == len(test)
    for value, samples in ((one.trained, both["image"][both["label"] == 1]), (one.untrained, both["untrained"][1::2])):
        assert value == pytest.approx(np.mean([kernel_distance(samples, held_out) for held_out in draws]), abs=1e-9)


def hearts(n: int, seed: int, size: int = 24) -> np.ndarray:
    """Rings with a crescent on the left and a bright corner below, (n, 1, size, size): they lie one way round."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    images = []
    for _ in range(n):
        v, u = y - rng.normal(0, 0.02), x - rng.normal(0, 0.02)
        ring = np.exp(-(((np.hypot(v, u) - rng.normal(0.2, 0.015)) / 0.05) ** 2))
        crescent, corner = (
            np.exp(-((v / 0.16) ** 2) - ((u + 0.3) / 0.08) ** 2),
            1 / (1 + np.exp((0.3 - v + u / 2) / 0.03)),
        )
        images.append(np.tanh(1.4 * ring + crescent + 0.8 * corner - 0.8 + 0.1 * rng.normal(size=(size, size))))
    return np.array(images, np.float32)[:, None]


def test_a_perfect_generator_of_the_expanded_set_is_near_the_floor(tmp_path: Path) -> None:
    """It draws new hearts of the cohort's own kind and expands them as its training set was (METHODS M3).

    Held against images that all lie one way round it would be called several times as far away.
    """
    text = made.toml(arms="none dae-gan:3", k=2, repeats=1)
    one = made.cohort(parse_study(text), patients=(20, 20))
    images = hearts(len(one.ids), 1)

    def make(task: planning.Task, real: np.ndarray) -> np.ndarray:
        draws = torch.Generator().manual_seed(task.fold)
        expanded = expand(torch.from_numpy(hearts(60, 2 + task.fold)), 8, draws).numpy()
        return expanded[np.random.default_rng(0).permutation(len(expanded))[:300]]

    write_workspace(tmp_path, text, one, images, make)
    distances = make_gallery(collect(tmp_path)).distances
    assert len(distances) == 4
    for distance in distances:
        test = images[one.split[0, distance.fold][2] & (one.label == distance.label)]
        plain = kernel_distance(make(planning.Task("synthesize", fold=distance.fold), images), test)
        assert abs(distance.trained - distance.floor) < plain / 6
        assert abs(distance.floor) < plain / 10
        assert distance.untrained > 3 * plain


def test_only_what_is_trained_on_expanded_images_is_compared_with_turned_ones() -> None:
    text = made.toml(arms="none dae-gan:3")
    outside = (
        text.replace("dae-gan", "stylegan")
        .replace("[generators.stylegan]", "")
        .replace("[primary]", '[generators.stylegan]\nexternal = "elsewhere"\n[primary]')
    )
    assert is_expanded(parse_study(text), "dae-gan")
    assert not is_expanded(parse_study(text + "[affine]\nfactor = 1\n"), "dae-gan")
    assert not is_expanded(parse_study(outside), "stylegan")


def test_no_figure_of_an_earlier_report_stays(workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "ws"
    shutil.copytree(workspace, root, ignore=shutil.ignore_patterns("report"))
    figures = root / "report/figures"
    figures.mkdir(parents=True)
    old = ("specificity.png", "folds_auc.png", "ratio_curve_auc.png", "samples_egan_class0.png", "training_egan.png")
    others = ("notes.txt", "mine.png", "auc_mine.png")
    for name in (*old, *others):
        (figures / name).write_text("old")
    written = set(aggregate(root).files)
    there = {path.name for path in figures.iterdir()}
    assert there == {Path(name).name for name in written if name.startswith("figures/")} | set(others)


def test_page_shows_strips_distances_curves_and_warnings(workspace: Path) -> None:
    result = aggregate(workspace)
    page = (result.folder / "index.html").read_text()
    kinds = ("real", "acgan", "dae-gan", "dae-gan+simgan")
    strips = {f"samples_{kind}_class{label}.png" for kind in kinds for label in (0, 1)}
    curves = {f"training_{part}.png" for part in ("acgan_classes", "dae-gan_class0", "dae-gan+simgan_class1")}
    assert strips | curves <= {path.name for path in (result.folder / "figures").glob("*.png")}
    assert "in which a heart lies any way round: acgan. So the real images" in page
    for kind in ("real, training images of fold 0", "synthetic, dae-gan", "refined, dae-gan by simgan"):
        assert re.search(rf"<figcaption>[^<]+: {kind}, \d+ images</figcaption>", page), kind
    assert "refined (simgan)" in page
    assert "one mutation wins &lt;nearly&gt; always" in page


def test_warnings_of_every_fold_and_repeat_are_told(workspace: Path) -> None:
    """Of 6 folds x repeats class 0 warned everywhere, acgan in one place that no curve on the page is of."""
    page = visible_text((aggregate(workspace).folder / "index.html").read_text())
    told = "13 of 30 trainings of generators and refiners warned"
    assert f"{told}: see Warnings while training ." in page
    assert f"! {told}: see Warnings while training on the page" in terminal_table(workspace)
    everywhere = (
        "6 trainings: fold 0 repeat 0; fold 1 repeat 0; fold 2 repeat 0; fold 0 repeat 1; fold 1 repeat 1 and 1 more"
    )
    often = "one mutation wins <nearly> always (90 %)"
    expected = [
        f"dae-gan, class normal: {often} ({everywhere})",
        "acgan: one mutation wins <nearly> always (92 %) (1 training: fold 2 repeat 1)",
        f"dae-gan+simgan, class normal: {often} ({everywhere})",
        "dae-gan+simgan, class normal: a loss is odd (2 trainings: fold 1 repeat 0; fold 1 repeat 1)",
    ]
    assert [warning.in_words() for warning in make_gallery(collect(workspace)).training_warnings] == expected
    assert all(line in page for line in expected)


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
