"""Mutated inputs for every reader: each must give a right result or one BadInput, in bounded time.

Images are read as ingest reads them, in a helper process: one that crashes is one BadInput.
`python -m tests.reliability.fuzz READER FOLDER SEED FIRST COUNT` is the worker for readers that rest on C libraries:
it prints the number of each input before it reads it, so that who started it can tell at which one it died.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cmrhpc import external, seal, shards, validity
from cmrhpc.data.images import Reader
from cmrhpc.data.table import read_table
from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.launch.records import read_record
from cmrhpc.launch.submissions import read_submissions
from cmrhpc.profile import Profile, load_profile
from cmrhpc.study import Study, parse_study

SECONDS = 20  # for one input; the readers need milliseconds
IMAGE_READER = Reader()  # one helper process for all images; who fuzzes closes it, and gives it less than SECONDS
WORDS = [
    b"0", b"-1", b"1e999", b"nan", b"inf", b"9" * 400, b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"../", b"/etc/passwd",
    b'"', b"'", b",", b"\n", b"\r", b"[", b"]", b"{", b"}", b"=", b"[[arms]]\n", b"true", b"null", b"[" * 3000,
    b'{"a":' * 3000, b"=cmd()", b"<script>", b"\xc3\x28", b"1979-05-27", b"0x7fffffffffffffffffff", b"_", b"e",
    b"\\u0000",
]  # fmt: skip


def mutated(data: bytes, random_: random.Random) -> bytes:
    """One to six changes: bits, bytes, cuts, repeats, words that parsers trip over."""
    made = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 3, 6))):
        at = random_.randrange(len(made) + 1)
        kind = random_.randrange(8)
        if kind <= 1 and made:
            made[min(at, len(made) - 1)] ^= 1 << random_.randrange(8)
        elif kind == 2 and made:
            made[min(at, len(made) - 1)] = random_.choice((0, 1, 127, 128, 255, random_.randrange(256)))
        elif kind == 3:
            del made[at : at + random_.choice((1, 2, 8, 200))]
        elif kind == 4:
            made[at:at] = random_.choice(WORDS)
        elif kind == 5:
            source = random_.randrange(len(made) + 1)
            made[at:at] = made[source : source + random_.choice((1, 8, 64))]
        elif kind == 6:
            word = random_.choice(WORDS)
            made[at : at + len(word)] = word
        elif random_.random() < 0.2:
            del made[at:]
        elif made:
            made[at : at + 8] = random_.randbytes(min(8, len(made)))
    return bytes(made)


# ------------------------------------------------------------------------------------------------ the readers


def read_csv(path: Path) -> None:
    for row in read_table(path.parent, path.name, check_files=False):
        assert row.label
        assert ".." not in Path(row.image).parts
        assert not row.image.startswith("/")


def read_toml(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    study = parse_study(text)
    assert Study.from_json(json.loads(json.dumps(study.to_json()))) == study


def read_tasks(path: Path) -> None:
    from cmrhpc.workspace import Workspace

    folder = path.parent / "workspace" / "tasks" / "classify"
    (folder / "0001.json").write_bytes(path.read_bytes())
    Workspace(path.parent / "workspace").tasks("classify")
    for other in folder.glob("*.json"):
        other.unlink()


def read_index(path: Path) -> None:
    from cmrhpc.workspace import Workspace

    (path.parent / "workspace" / "index.json").write_bytes(path.read_bytes())
    workspace = Workspace(path.parent / "workspace")
    assert workspace.index() == {}  # it holds no shard, whatever the file says
    validity.states(workspace, ("ingest",))


def read_log_record(path: Path) -> bool:
    record = read_record(path)
    assert record is None or isinstance(record.alive(), bool)
    return record is not None


def read_seal(path: Path) -> bool:
    """Its sha256 is made right again, where it is still a seal, so that the mutation reaches what is behind it."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        told = json.loads(path.read_bytes())
        told.pop("sha256", None)
        path.write_text(seal._text(told))
    found = seal.read(path)
    assert found is None or all(isinstance(n, int) for n in (found.counts.leaks, found.counts.missing))
    assert bool(found) == (seal.damage(path) != [f"{path.name}: its checksum does not hold"])
    return found is not None


def read_checkpoint(path: Path) -> bool:
    """The digest in front is made right again, so that the mutation reaches the parser."""
    import hashlib

    from cmrhpc.train.checkpoint import Checkpoints

    blob = path.read_bytes().partition(b"\n")[2]
    name = path.with_name("checkpoints") / "step0000000003.checkpoint"
    name.parent.mkdir(exist_ok=True)
    name.write_bytes(hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob)
    return Checkpoints(name.parent, {"a": 1}).newest() is not None


def read_hdf5(path: Path) -> None:
    """The stamp is made right again, so that the mutation reaches the HDF5 library."""
    data = path.read_bytes()
    if len(data) > shards.USER_BLOCK:
        shards._stamp(path)
    shard = shards.read_shard(path)
    for name in shard.names:
        shard[name]
    shards.check_content(shard)
    shards.check_companions(shard, path.parent)


def read_hdf5_unstamped(path: Path) -> None:
    """As it comes: the stamp decides, and the HDF5 library never sees the file."""
    assert shards.damage_of(path) or path.read_bytes() == (path.parent / "seed_hdf5").read_bytes()


def read_profile(path: Path) -> None:
    assert isinstance(load_profile(path), Profile)


def read_submission(path: Path) -> bool:
    from cmrhpc.workspace import Workspace

    place = path.parent / "workspace" / "submissions" / "7.json"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(path.read_bytes())
    found = read_submissions(Workspace(path.parent / "workspace"))
    for submission in found:
        assert submission.key(0).startswith("7")
        assert all(isinstance(index, int) for element in submission.elements for index in element)
        assert all(isinstance(text, str) for text in (submission.name, submission.memory, *submission.depends_on))
        assert isinstance(submission.time_limit_s, int | float)
    return bool(found)


def read_sums(path: Path) -> None:
    root = path.parent / "external"
    root.mkdir(exist_ok=True)
    (root / external.SUMS).write_bytes(path.read_bytes())
    for folder, listed in external.read_sums(root).items():
        assert folder != ".."
        assert not any("/" in name or name.startswith(".") or len(digest) != 64 for name, digest in listed.items())


def read_train_ids(path: Path) -> None:
    heading, rows = external.read_columns(path, "train_ids.csv")
    assert all(row.keys() <= set(heading) for row in rows)


def read_images_csv(path: Path) -> None:
    from cmrhpc.stages.external import _unit

    for row in external.read_columns(path, "images.csv")[1]:
        values = _unit(np.array([[[-1.0], [0.0], [1.0]]]), row, "images.csv")
        assert np.abs(values).max() <= 1.0


def read_image(path: Path) -> None:
    image = IMAGE_READER.read(path, "row 1")
    assert image.pixels.ndim == 3
    assert image.pixels.shape[2] in (1, 3)
    assert np.isfinite(image.pixels.astype(float)).all()
    assert image.spacing is None or all(1e-3 <= value <= 1e3 for value in image.spacing)


IMAGES = ("mha", "nii", "nii.gz", "nrrd", "gipl", "dcm", "png", "jpg", "tif", "bmp")
READERS: dict[str, Callable[[Path], bool | None]] = {  # False: it passed over what is broken
    "csv": read_csv,
    "toml": read_toml,
    "profile": read_profile,
    "submission": read_submission,
    "sums": read_sums,
    "train_ids": read_train_ids,
    "images_csv": read_images_csv,
    "tasks": read_tasks,
    "index": read_index,
    "record": read_log_record,
    "seal": read_seal,
    "checkpoint": read_checkpoint,
    "hdf5_unstamped": read_hdf5_unstamped,
    "hdf5": read_hdf5,
} | {f"image.{ending}": read_image for ending in IMAGES}
IN_WORKERS = {"hdf5"}


# ------------------------------------------------------------------------------------------------ the loop


class TookTooLong(Exception):
    pass


def _alarm(number: int, frame: object) -> None:
    raise TookTooLong


def read_one(reader: str, folder: Path, seed: int, number: int) -> str:
    """Read input `number`; "good" or "refused". Any other exception is a fault of the reader and goes through."""
    source = (folder / f"seed_{reader.removesuffix('_unstamped')}").read_bytes()
    path = folder / f"input_{reader}"
    path.write_bytes(mutated(source, random.Random(f"{reader} {seed} {number}")))
    try:
        READERS[reader](path)
        return "good"
    except BadInput:
        return "refused"
    except CmrhpcError as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def fuzz(reader: str, folder: Path, seed: int, count: int) -> Counter[str]:
    """Read `count` mutated inputs here, with a time limit for each. The timer of pytest-timeout runs on after them."""
    found: Counter[str] = Counter()
    begun, (left, interval) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, _alarm)
    try:
        for number in range(count):
            signal.alarm(SECONDS)
            try:
                found[read_one(reader, folder, seed, number)] += 1
            except Exception as error:
                raise AssertionError(f"{reader}, seed {seed}, input {number}: {error!r}") from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - begun)), interval)
    return found


def fuzz_in_workers(reader: str, folder: Path, seed: int, count: int) -> Counter[str]:
    """The same in processes of their own: a crash or hang of the C library is counted, and the next input is read."""
    found: Counter[str] = Counter()
    number = 0
    while number < count:
        script = [sys.executable, "-m", "tests.reliability.fuzz", reader, folder, str(seed), str(number), str(count)]
        done = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=3600)
        lines = done.stdout.splitlines()
        found.update(line.split()[1] for line in lines if len(line.split()) == 2)
        number = int(lines[-1].split()[0]) + 1 if lines else number + 1
        if done.returncode == -signal.SIGALRM:
            found["hang"] += 1
        elif done.returncode < 0:
            found[f"crash by signal {-done.returncode}"] += 1
        elif done.returncode:
            raise AssertionError(f"{reader}, seed {seed}, input {number - 1}: {done.stderr[-3000:]}")
    return found


def work(reader: str, folder: Path, seed: int, first: int, count: int) -> None:
    """The worker: `NUMBER` before an input is read, `NUMBER RESULT` after. A hang ends by SIGALRM."""
    for number in range(first, count):
        print(number, flush=True)
        signal.alarm(SECONDS)
        result = read_one(reader, folder, seed, number)
        signal.alarm(0)
        print(number, result, flush=True)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
