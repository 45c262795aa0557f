"""Checkpoint files: what comes back, damage, other settings, how many are kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cmrhpc.errors import BadInput
from cmrhpc.train.checkpoint import Checkpoints, differences

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


def test_tuples_and_lists_are_the_same_setting(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"a": (1, 2)}).save(1, tensors(1), {})
    assert Checkpoints(tmp_path, {"a": [1, 2]}).newest() is not None
    assert differences({"a": 1}, {"a": 1}) == []


def test_due_by_time(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, SETTINGS, every_seconds=0).due()
    assert not Checkpoints(tmp_path, SETTINGS, every_seconds=1000).due()
