"""Shards: what is written comes back, every changed byte is noticed, and nothing hostile is followed."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from cmrhpc import files, shards
from cmrhpc.errors import BadInput, Incomplete
from cmrhpc.provenance import provenance

RNG = np.random.default_rng(0)
DATA = {
    "image": RNG.normal(size=(5, 1, 8, 8)).astype("f4"),
    "label": np.arange(5),
    "id": shards.text_array(list("abcde")),
}


def write(path: Path, **changes: object) -> str:
    values: dict = {
        "datasets": DATA,
        "schema": "images-1",
        "task": {"stage": "synthesize", "fold": 0},
        "settings": {"gamma": 0.1},
        "inputs": {"cohort.h5": "ab" * 32},
        "seed": 3,
        "attributes": {"classes": ["0", "1"]},
    } | changes
    return shards.write_shard(path, values.pop("datasets"), **values)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    content = write(tmp_path / "a.h5", companions={".png": b"picture", ".jsonl": b"{}\n"}, info={"seconds": 1.5})
    shard = shards.read_shard(tmp_path / "a.h5", "images-1")
    for name, values in DATA.items():
        np.testing.assert_array_equal(shard[name], values)
    assert shard.strings("id") == list("abcde")
    assert (shard.seed, shard.content_sha256, shard.attributes) == (3, content, {"classes": ["0", "1"]})
    assert shard.info["seconds"] == 1.5
    assert (tmp_path / "a.png").read_bytes() == b"picture"
    assert shards.check_companions(shard, tmp_path) == []
    assert shards.check_content(shard) == ""
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "a.jsonl", "a.png"]


def test_a_file_system_that_refuses_locks_takes_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's lock on the new file refuses ours, as a file system without locks does."""
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)
    create, held = files.create, []

    def create_locked(path: Path) -> None:
        create(path)
        held.append(os.open(path, os.O_RDONLY))
        fcntl.flock(held[-1], fcntl.LOCK_EX)

    monkeypatch.setattr(files, "create", create_locked)
    write(tmp_path / "a.h5")
    assert shards.read_shard(tmp_path / "a.h5")["label"].tolist() == [0, 1, 2, 3, 4]
    os.close(held[0])


def test_several_datasets_from_one_opening(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    shard = shards.read_shard(tmp_path / "a.h5")
    found = shard.read_many(["label", "image"], slice(1, 3))
    assert list(found) == ["label", "image"]
    np.testing.assert_array_equal(found["image"], DATA["image"][1:3])
    with pytest.raises(BadInput, match="no dataset"):
        shard.read_many(["label", "mask"])


def test_the_user_block_holds_the_sha256_of_what_follows(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path / "a.h5")
    raw = (tmp_path / "a.h5").read_bytes()
    assert hashlib.sha256(raw[512:]).hexdigest().encode() in raw[:512]
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.userblock_size == 512
        assert json.loads(file.attrs["task"]) == {"stage": "synthesize", "fold": 0}


def test_same_content_same_hash_and_each_part_of_it_counts(tmp_path: Path) -> None:
    first = write(tmp_path / "a.h5", info={"seconds": 1.0})
    assert write(tmp_path / "b.h5", info={"seconds": 2.0}, companions={".png": b"x"}) == first
    changed = DATA | {"image": np.nextafter(DATA["image"], np.float32(9))}
    others = [
        write(tmp_path / "c.h5", datasets=changed),
        write(tmp_path / "c.h5", schema="images-2"),
        write(tmp_path / "c.h5", task={"stage": "synthesize", "fold": 1}),
        write(tmp_path / "c.h5", settings={"gamma": 0.2}),
        write(tmp_path / "c.h5", inputs={}),
        write(tmp_path / "c.h5", seed=4),
        write(tmp_path / "c.h5", attributes={"classes": ["1", "0"]}),
    ]
    assert len({first, *others}) == 8


def test_blocks_are_the_same_as_one_array(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.h5")
    image = DATA["image"]
    parts = shards.Blocks(image.shape, "<f4", (image[i : i + 2] for i in range(0, 5, 2)))
    assert write(tmp_path / "b.h5", datasets=DATA | {"image": parts}) == whole


def test_every_flipped_bit_is_noticed_before_hdf5_opens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    good = path.read_bytes()
    for position in RNG.integers(0, len(good), 300):
        bad = bytearray(good)
        bad[position] ^= 1 << int(RNG.integers(8))
        path.write_bytes(bad)
        assert shards.damage_of(path), position
        with pytest.raises(BadInput):
            shards.read_shard(path)
    for length in (0, 100, 511, 512, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert shards.damage_of(path), length


def test_changed_and_missing_companions_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", companions={".png": b"picture", ".jsonl": b"{}\n"})
    (tmp_path / "a.png").write_bytes(b"pictura")
    (tmp_path / "a.jsonl").unlink()
    wrong = shards.check_companions(shards.read_shard(tmp_path / "a.h5"), tmp_path)
    assert sorted(name for name, _ in wrong) == ["a.jsonl", "a.png"]


def test_long_attributes_have_a_place(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", attributes={"long": "x" * 200_000}, settings={"k": "y" * 70_000})
    assert len(shards.read_shard(tmp_path / "a.h5").attributes["long"]) == 200_000


def hostile(path: Path, change: str, secret: Path) -> None:
    """A shard with a right checksum and something in it that must not be followed."""
    write(path)
    with h5py.File(path, "r+") as file:
        if change == "soft link":
            file["extra"] = h5py.SoftLink("/image")
        elif change == "external link":
            file["extra"] = h5py.ExternalLink(str(secret), "image")
        elif change == "external storage":
            size = secret.stat().st_size
            file.create_dataset("extra", (size,), "u1", external=[(str(secret), 0, size)])
        elif change == "virtual dataset":
            layout = h5py.VirtualLayout((5,), "f4")
            layout[:] = h5py.VirtualSource(str(secret), "image", (5,))
            file.create_virtual_dataset("extra", layout)
        elif change == "huge shape":
            file.create_dataset("extra", (10**12,), "f4", chunks=(1024,))
        elif change == "group":
            file.create_group("extra")
        elif change == "variable length":
            file.create_dataset("extra", (1,), h5py.string_dtype())
        elif change == "unlisted dataset":
            file.create_dataset("extra", data=np.zeros(3, "f4"))
        elif change == "no attribute":
            del file.attrs["task"]
        elif change == "attribute of another kind":
            file.attrs["inputs"] = np.bytes_(b"[1]")
        elif change == "no number":
            file.attrs["task"] = np.bytes_(b'{"fold": NaN}')
    shards._stamp(path)


@pytest.mark.parametrize(
    "change",
    [
        "soft link", "external link", "external storage", "virtual dataset", "huge shape", "group",
        "variable length", "unlisted dataset", "no attribute", "attribute of another kind",
        "no number",
    ],
)  # fmt: skip
def test_hostile_shards_are_refused(tmp_path: Path, change: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"nobody may read this")
    hostile(tmp_path / "a.h5", change, secret)
    assert shards.damage_of(tmp_path / "a.h5") == ""
    with pytest.raises(BadInput, match="refused"):
        shards.read_shard(tmp_path / "a.h5")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc, and a limit on memory that holds")
def test_a_lack_of_memory_is_no_fault_of_the_shard(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", datasets=DATA | {"image": np.zeros((128, 2**20), "u1")})
    code = (
        "import resource, sys; from pathlib import Path; from cmrhpc import shards\n"
        "shards.read_shard_with(sys.argv[1], ['label'])\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))\n"
        "try: shards.read_shard_with(sys.argv[1], ['image'])\n"
        "except BaseException as error: print(type(error).__mro__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.h5")]
    assert "<class 'MemoryError'>" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_shard_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with pytest.raises(BadInput, match="schema"):
        shards.read_shard(tmp_path / "a.h5", "predictions-1")


def test_an_unfinished_write_leaves_the_old_shard(tmp_path: Path) -> None:
    content = write(tmp_path / "a.h5")
    broken = shards.Blocks((5, 1, 8, 8), "<f4", (DATA["image"][i : i + 1] for i in range(4)))
    with pytest.raises(ValueError, match="4 rows"):
        write(tmp_path / "a.h5", datasets=DATA | {"image": broken})
    assert shards.read_shard(tmp_path / "a.h5").content_sha256 == content
    assert os.listdir(tmp_path) == ["a.h5"]


def test_another_shard_that_takes_the_name_is_not_read_as_the_one_that_was_checked(tmp_path: Path) -> None:
    other = DATA | {"image": DATA["image"] + 1}
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5", datasets=other)
    shard = shards.read_shard(tmp_path / "a.h5")
    (tmp_path / "b.h5").rename(tmp_path / "a.h5")
    for rows in (slice(None), slice(1, 3)):
        with pytest.raises(BadInput, match="replaced by another"):
            shard.read("image", rows)
    write(tmp_path / "a.h5", info={"seconds": 9.0})  # the same content by another process: two may work on one task
    np.testing.assert_array_equal(shard["image"], DATA["image"])
    np.testing.assert_array_equal(shard.read("image", slice(1, 3)), DATA["image"][1:3])
    (tmp_path / "a.h5").unlink()
    with pytest.raises(BadInput, match="missing"):
        shard["image"]


def test_a_bit_that_flips_after_the_check_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    os.utime(tmp_path / "a.h5", (0, 0))
    shard = shards.read_shard(tmp_path / "a.h5")
    raw = bytearray((tmp_path / "a.h5").read_bytes())
    place = bytes(raw).index(DATA["image"].tobytes())
    raw[place + 100] ^= 1
    with open(tmp_path / "a.h5", "r+b") as stream:  # in place: the inode stays
        stream.write(raw)
    with pytest.raises(BadInput, match="checksum"):
        shard.read("image", slice(0, 2))


def test_inside_an_image_its_checksum_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMRHPC_CONTAINER_SHA256", raising=False)
    monkeypatch.setenv("APPTAINER_CONTAINER", str(tmp_path / "cmrhpc.sif"))
    assert provenance()["container_sha256"] == ""
    (tmp_path / "cmrhpc.sif.sha256").write_text(f"{'ab' * 32}  cmrhpc.sif\n")
    assert provenance()["container_sha256"] == "ab" * 32
    (tmp_path / "cmrhpc.sif.sha256").write_text("not a checksum")
    assert provenance()["container_sha256"] == ""
    monkeypatch.setenv("CMRHPC_CONTAINER_SHA256", "cd" * 32)
    assert provenance()["container_sha256"] == "cd" * 32


def test_a_shard_that_another_process_finished_is_not_half_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.h5", companions={".jsonl": b"one", ".png": b"one"})
    identity = os.stat(tmp_path / "a.h5").st_ino

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "atomic_write", killed)  # at its first companion
    write(tmp_path / "a.h5", companions={".jsonl": b"two", ".png": b"two"})
    monkeypatch.undo()
    assert os.stat(tmp_path / "a.h5").st_ino == identity
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "a.jsonl", "a.png"]
    assert shards.check_companions(shards.read_shard(tmp_path / "a.h5"), tmp_path) == []
    # Where a companion is damaged, or gone, the shard is written again with its own.
    (tmp_path / "a.png").write_bytes(b"damaged")
    write(tmp_path / "a.h5", companions={".jsonl": b"two", ".png": b"two"})
    assert (tmp_path / "a.jsonl").read_bytes() == b"two"
    assert shards.check_companions(shards.read_shard(tmp_path / "a.h5"), tmp_path) == []


def test_a_writer_that_never_sees_its_own_companions_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, which stands for one that hangs in the same work, writes after each of our writes."""
    write_ours = files.atomic_write

    def write_both(path: Path, data: bytes) -> None:
        write_ours(path, data)
        write_ours(path, b"theirs")

    monkeypatch.setattr(files, "atomic_write", write_both)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(Incomplete, match="another process keeps writing this shard") as raised:
        write(tmp_path / "a.h5", companions={".jsonl": b"ours"})
    assert raised.value.where == str(tmp_path / "a.h5")


def test_a_companion_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.h5", companions={".jsonl": b"one"})
    shard = shards.read_shard(tmp_path / "a.h5")

    def unreadable(path: Path, start: int = 0) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(shards, "sha256_file", unreadable)
    assert shards.check_companions(shard, tmp_path) == [("a.jsonl", "cannot be read: Input/output error")]
