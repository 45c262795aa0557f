"""The benchmark's sections give the keys that are promised, and the prediction's arithmetic is right. No times."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from cmrhpc import cli
from cmrhpc.bench import predict, timing
from cmrhpc.errors import UsageError
from cmrhpc.planning import Task
from tests.report import made


def test_contestants_take_turns_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []
    times = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert timing.ratio({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]}, "a", "b") == 3.0


def test_json_has_every_promised_key_and_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--json", "--only", "shards"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"generation", "classifier", "task_overhead_s", "shards", "gpu"} <= found.keys()
    assert found["shards"]["read_ratio"] > 0
    assert found["gpu"] is None
    assert "cpu" in found["machine"]


def test_an_unknown_section_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--only", "clasifier"]) == UsageError.exit_code
    assert "classifier" in capsys.readouterr().err


def test_what_is_no_workspace_is_told_before_anything_is_measured(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert cli.main(["bench", str(tmp_path / "nosuch"), "--only", "shards"]) == 3
    assert "not a workspace" in capsys.readouterr().err


def test_many_tasks_are_planned_and_aggregated(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from cmrhpc.bench.tasks import many

    found = many(tmp_path / "many", 100)
    assert found["tasks"] == 102
    assert {"plan_s", "status_s", "aggregate_s"} <= found.keys()


def test_a_task_is_its_steps_logs_and_samples() -> None:
    study = made.study(arms="none dae-gan:3", k=2)
    generator = dataclasses.replace(study.generators["dae-gan"], generations=100, log_every=30, max_ratio=4.0)
    study = dataclasses.replace(study, generators={"dae-gan": generator})
    sizes = predict.Sizes((10, 20), train=0.4, validation=0.1, test=0.5)
    costs = {"step_s": 2.0, "log_s": 3.0, "sample_s": 0.5, "before_s": 7.0, "after_s": 1.0}
    task = Task("synthesize", generator="dae-gan", label=1)
    assert predict.task_seconds(study, task, costs, sizes, outside=0.25) == pytest.approx(
        7 + 1 + 0.25 + 100 * 2 + 4 * 3 + 4 * 20 * 0.4 * 0.5
    )
    steps = study.classifiers["resnet50"].steps
    told = predict.task_seconds(study, Task("classify", arm="none", classifier="resnet50"), costs, sizes, 0.0)
    assert told == pytest.approx(8 + steps * 2 + (steps / 50 + 1 + 5) * 3)


def test_steps_and_log_entries_are_told_apart() -> None:
    ticks = [100.0, 109.0, 118.0, 119.0, 120.0, 121.0, 126.0, 131.0]  # two slow steps; two with a log entry of 4 s
    assert predict.step_costs("classify", ticks, 8, 7) == {"step_s": 1.0, "log_s": 4.0}
    # As on a GPU: the first log entries come with a step that is not recorded yet, which later ones are.
    gaps = [9.0, *[1.0] * 19]
    for step, took in ((4, 30.0), (8, 30.0), (12, 40.0), (16, 3.0), (20, 3.0)):
        gaps[step - 1] = took
    ticks = [sum(gaps[: i + 1]) for i in range(20)]
    assert predict.step_costs("synthesize", ticks, 20, 4) == {"step_s": 1.0, "log_s": 2.0}
    gaps = [50.0, *[7.0, 7.0, 1.0, 1.0, 1.0], 9.0, *[7.0, 7.0, 2.0, 2.0, 2.0], 9.0, *[7.0, 7.0, 5.0, 5.0, 5.0]]
    told = predict.step_costs("refine", [sum(gaps[: i + 1]) for i in range(len(gaps))], 6, 5)
    assert told == {"pretrain_refiner_s": 1.0, "pretrain_discriminator_s": 2.0, "step_s": 5.0, "log_s": 0.0}


def test_validation_is_cut_from_what_the_test_leaves() -> None:
    study, _ = predict.load("")
    sizes = predict.sizes_of(study, None)
    assert (sizes.train, sizes.validation, sizes.test) == pytest.approx((0.64, 0.16, 0.2))


def test_jobs_take_tasks_in_order() -> None:
    assert predict.schedule([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert predict.schedule([1.0, 1.0, 3.0], 2) == 4.0
    assert predict.schedule([2.0, 2.0], 1) == 4.0


def test_operations_of_a_generation_are_counted() -> None:
    import torch

    from cmrhpc.bench import training
    from cmrhpc.nets.dae_gan import residual_pair
    from cmrhpc.train.evolution import Evolution
    from tests.train import small

    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8)
    with training._Operations() as counter:
        conv(x).sum().backward()
    assert counter.total == 2 * (2 * 2 * 5 * 8 * 8 * 3 * 3 * 3)  # forward and the weights' gradient
    g, d = residual_pair(16, 1, 5, 4, torch.Generator().manual_seed(0))
    draws = small.draws(torch.Generator().manual_seed(1), dtype=torch.float32, mixup=True, passes=1)
    assert training._flops(Evolution(g, d, workers=1), draws) > 10**6


def test_images_that_something_else_made_cost_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"step_s": 1.0, "log_s": 0.0, "sample_s": 0.0, "before_s": 0.0, "after_s": 0.0, "import_s": 0.0}
    monkeypatch.setattr(predict, "_in_children", lambda *told: costs)
    study = made.study(arms="none dae-gan:3", k=2)
    elsewhere = dataclasses.replace(study.generators["dae-gan"], external="elsewhere")
    found = [
        predict.predict(dataclasses.replace(study, generators={"dae-gan": generator}), None, 1, 0.0)["stages"]
        for generator in (study.generators["dae-gan"], elsewhere)
    ]
    assert [list(stages) for stages in found] == [["synthesize", "classify"], ["classify"]]
    assert found[0]["classify"] == found[1]["classify"]


@pytest.mark.slow
def test_real_steps_of_every_kind_of_task_are_measured() -> None:
    study = made.study(arms="none dae-gan:3 dae-gan+simgan:1", k=2, repeats=1)
    study = dataclasses.replace(study, data=dataclasses.replace(study.data, image_size=16))
    found = predict.predict(study, None, 1, 0.0)
    assert found["stages"].keys() == {"synthesize", "refine", "classify"}
    assert all(row["wall_s"] > 0 and row["tasks"] for row in found["stages"].values())


def test_the_parts_that_run_alone_are_no_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cmrhpc.bench.child"], capture_output=True, text=True)
    assert done.returncode


def test_many_models_train_side_by_side_and_one_that_ends_is_told() -> None:
    from cmrhpc.bench.training import many_models
    from cmrhpc.errors import CmrhpcError

    assert many_models(2, 1, "cpu", "dcgan") > 0
    with pytest.raises(CmrhpcError, match="one of them ended"):
        many_models(1, 1, "cpu", "no such net")
