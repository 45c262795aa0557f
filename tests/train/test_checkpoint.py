"""Checkpoint files: what comes back, damage, other settings, how many are kept."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmrhpc.errors import BadInput, Checkpointed
from cmrhpc.files import never_create
from cmrhpc.hashing import differences
from cmrhpc.train.checkpoint import Checkpoints
from tests.train.small import same

SETTINGS = {"seed": 3, "generator": {"batch": 32, "mutations": ["minimax"]}}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "float": torch.full((3, 2), float(step)),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "long": torch.tensor(step),
        "strided": torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "empty": torch.zeros(0),
    }


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", SETTINGS)
    assert checkpoints.newest() is None
    state = {"list": [1, 2.5, math.pi], "none": None, "nested": {"a": "é"}}
    checkpoints.save(7, tensors(7), state)
    saved = Checkpoints(tmp_path / "c", SETTINGS).newest()
    assert saved is not None
    assert saved.step == 7
    assert saved.state == state
    assert saved.tensors.keys() == tensors(7).keys()
    for name, tensor in tensors(7).items():
        assert saved.tensors[name].dtype == tensor.dtype
        assert torch.equal(saved.tensors[name], tensor)


def test_views_of_one_storage_may_be_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SETTINGS)
    both = torch.arange(4.0)
    checkpoints.save(1, {"a": both[:2], "b": both[1:]}, {})
    saved = checkpoints.newest()
    assert saved is not None
    assert torch.equal(saved.tensors["b"], both[1:])


def test_newest_four_are_kept_and_clear_removes_all(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", SETTINGS)
    for step in (1, 20, 3, 400, 50, 6):
        checkpoints.save(step, tensors(step), {})
    assert [int(p.name[4:14]) for p in files(tmp_path / "c")] == [6, 20, 50, 400]
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == 400
    checkpoints.clear()
    assert not (tmp_path / "c").exists()
    checkpoints.clear()


@pytest.mark.parametrize("damage", ["flip digest", "flip header", "flip tensor", "truncate", "empty", "append"])
def test_an_older_one_serves_when_the_newest_is_damaged(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, SETTINGS)
    for step in (1, 2):
        checkpoints.save(step, tensors(step), {"step": step})
    newest = files(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    elif damage == "append":
        data += b"x"
    else:
        at = {"flip digest": 5, "flip header": 100, "flip tensor": len(data) - 3}[damage]
        data[at] ^= 1
    newest.write_bytes(bytes(data))
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == 1
    files(tmp_path)[0].write_bytes(b"")
    assert checkpoints.newest() is None


def test_a_right_digest_over_nonsense_is_damage_too(tmp_path: Path) -> None:
    import hashlib

    for number, blob in enumerate((b"", b"x" * 50, (5).to_bytes(8, "little") + b"[1,2]", b"\xff" * 16)):
        name = tmp_path / f"step{number:010d}.checkpoint"
        name.write_bytes(hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob)
    assert Checkpoints(tmp_path, SETTINGS).newest() is None


def test_other_settings_are_refused_with_the_differences(tmp_path: Path) -> None:
    Checkpoints(tmp_path, SETTINGS).save(1, tensors(1), {})
    other = {"seed": 4, "generator": {"batch": 32, "mutations": ["minimax", "heuristic"]}, "new": True}
    with pytest.raises(BadInput) as error:
        Checkpoints(tmp_path, other).newest()
    assert "seed: 3 -> 4" in error.value.what
    assert 'generator.mutations: ["minimax"] -> ["minimax", "heuristic"]' in error.value.what
    assert "new: null -> true" in error.value.what
    assert "batch" not in error.value.what


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change what a checkpoint says of itself, and its tensors, and make its digest right again."""
    import hashlib

    from safetensors.torch import load, save

    blob = path.read_bytes().partition(b"\n")[2]
    meta = json.loads(json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]["cmrhpc"])
    held = load(blob)
    change(meta, held)
    blob = save(held, metadata={"cmrhpc": json.dumps(meta)})
    path.write_bytes(hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob)


@pytest.mark.parametrize(
    ("trainer", "of"),
    [
        *(("gan", of) for of in ("format", "no format", "tensor", "shape", "state")),
        *(("refiner", of) for of in ("tensor", "shape", "state")),
        ("classifier", "tensor"),
    ],
)
def test_a_checkpoint_of_another_version_starts_the_training_anew(
    tmp_path: Path, trainer: str, of: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.train import test_classify, test_gan, test_refine

    train: Callable[..., Any] = {
        "gan": lambda **more: test_gan.train(test_gan.TINY, **more),
        "refiner": lambda **more: test_refine.train(test_refine.TINY, **more),
        "classifier": test_classify.train,
    }[trainer]

    def change(meta: dict[str, Any], held: dict[str, torch.Tensor]) -> None:
        name = {"gan": "d", "refiner": "d.0.weight", "classifier": "order.rng"}[trainer]
        name = name if name in held else next(n for n in sorted(held) if held[n].dim() > 1 and "momentum" not in n)
        meta["version"] = "0.0.9"
        if of == "format":
            meta["format"] = 0
        elif of == "no format":
            del meta["format"]
        elif of == "tensor":
            held["another." + name] = held.pop(name)
        elif of == "shape":
            held[name] = torch.cat([held[name], held[name]])
        else:
            del meta["state"][{"gan": "entries", "refiner": "window", "classifier": "history"}[trainer]]

    with pytest.raises(Checkpointed):
        train(checkpoints=Checkpoints(tmp_path, {}), should_stop=lambda: True)
    (path,) = files(tmp_path)
    rewrite(path, change)
    logs: list[list[Any]] = [[], []]
    anew = train(checkpoints=Checkpoints(tmp_path, {}, every_seconds=1000), log=logs[0].append)
    told = capsys.readouterr().out
    assert "written by another version of cmrhpc (0.0.9)" in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("*"))
    whole = train(log=logs[1].append)
    assert same(weights(anew), weights(whole))
    assert len(logs[0]) == len(logs[1])  # what the unreadable one had logged is not handed out


def weights(trained: Any) -> dict[str, torch.Tensor]:
    return trained.weights() if hasattr(trained, "weights") else trained.network.state_dict()


def test_a_device_out_of_memory_is_not_another_version(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SETTINGS)
    checkpoints.save(1, tensors(1), {})
    with pytest.raises(RuntimeError, match="CUDA out of memory"), checkpoints.loading():
        raise RuntimeError("CUDA out of memory")
    assert files(tmp_path)


def test_tuples_and_lists_are_the_same_setting(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"a": (1, 2)}).save(1, tensors(1), {})
    assert Checkpoints(tmp_path, {"a": [1, 2]}).newest() is not None
    assert differences({"a": 1}, {"a": 1}) == []


def test_due_by_time(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, SETTINGS, every_seconds=0).due()
    assert not Checkpoints(tmp_path, SETTINGS, every_seconds=1000).due()


def test_the_time_counts_from_the_last_one_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("cmrhpc.train.checkpoint.time.monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, SETTINGS, every_seconds=60)
    now += 61
    assert checkpoints.due()
    checkpoints.save(1, {}, {})
    assert not checkpoints.due()
    now += 61
    assert checkpoints.due()


@pytest.mark.timeout(120)
def test_a_checkpoint_that_is_no_plain_file_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", SETTINGS)
    checkpoints.save(1, tensors(1), {})
    (tmp_path / "elsewhere").write_bytes((tmp_path / "c/step0000000001.checkpoint").read_bytes())
    (tmp_path / "c/step0000000002.checkpoint").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "c/step0000000003.checkpoint")
    (tmp_path / "c/step0000000004.checkpoint").mkdir()
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == 1
    checkpoints.save(5, tensors(5), {})
    checkpoints.clear()
    assert os.listdir(tmp_path / "c") == ["step0000000004.checkpoint"]
    assert (tmp_path / "elsewhere").exists()


def test_checkpoints_behind_a_link_out_of_the_workspace_are_neither_read_nor_removed(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "outside/task", SETTINGS).save(1, tensors(1), {})
    (tmp_path / "w").mkdir()
    (tmp_path / "w/checkpoints").symlink_to(tmp_path / "outside")
    never_create(tmp_path / "w")
    checkpoints = Checkpoints(tmp_path / "w/checkpoints/task", SETTINGS)
    assert checkpoints.newest() is None
    with pytest.raises(BadInput, match="leads out of the workspace"):
        checkpoints.save(2, tensors(2), {})
    checkpoints.clear()
    assert len(files(tmp_path / "outside/task")) == 1


def test_a_folder_of_damaged_ones_does_not_swallow_what_is_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, SETTINGS)
    for step in (100, 200, 300, 400):
        checkpoints.save(step, tensors(step), {})
    for path in files(tmp_path):
        path.write_bytes(b"damaged")
    again = Checkpoints(tmp_path, SETTINGS)
    assert again.newest() is None
    again.save(5, tensors(5), {})
    saved = Checkpoints(tmp_path, SETTINGS).newest()
    assert saved is not None
    assert saved.step == 5
    for step in (100, 200):  # whose earlier files were among the damaged
        again.save(step, tensors(step), {})
    assert [int(path.name[4:14]) for path in files(tmp_path)] == [5, 100, 200]
    for path in files(tmp_path):
        path.write_bytes(b"damaged")
    third = Checkpoints(tmp_path, SETTINGS)
    assert third.newest() is None
    third.save(200, tensors(200), {})  # at once the step of a damaged one
    assert [int(path.name[4:14]) for path in files(tmp_path)] == [200]
