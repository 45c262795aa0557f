"""What is built once and kept between runs: Debian roots and the container image, each under a hash of its recipe.

The folder is ``$CMRHPC_TEST_CACHE`` or ``~/.cache/cmrhpc-tests``. Nothing here is needed twice: it may be deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = 2  # of each name, the last used: an image alone takes 3 GB


def folder() -> Path:
    """The cache folder, made when missing."""
    path = Path(os.environ.get("CMRHPC_TEST_CACHE") or Path.home() / ".cache" / "cmrhpc-tests").resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def key_of(*recipe: str | Path | Iterable[str]) -> str:
    """Sixteen hex digits over the words and the contents of the files of a recipe."""
    digest = hashlib.sha256()
    for part in recipe:
        data = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """``folder()/name-key``; when missing, ``build(temporary)`` makes it and it is renamed in one step.

    One builder at a time: others wait and find it done. All but the last two used of a name are removed.
    """
    target = folder() / f"{name}-{key}"
    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            temporary = target.with_name(f"{name}.part")
            remove(temporary)
            build(temporary)
            temporary.rename(target)
        os.utime(target)
        for old in sorted(folder().glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            if not mounted(old):  # else another clone's tests run on it
                remove(old)
    return target


def mounted(path: Path) -> bool:
    """Whether anything is mounted below a folder."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return any(Path(point).is_relative_to(path) for point in points)


def remove(path: Path) -> None:
    """Delete a folder of the cache; refuse while anything is mounted below it."""
    if mounted(path):
        raise RuntimeError(f"{path} holds a mount; not deleting it")
    if path.exists():
        shutil.rmtree(path)


def debian_mirror() -> str:
    """The Debian archive that this machine's own apt uses."""
    fields = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]
    for update in (False, True):
        if update:  # a machine whose package lists were thrown away names no archive before
            subprocess.run(["apt-get", "-qq", "update"], check=False)
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        mirrors = sorted({line.split("|")[2] for line in found if line.startswith("Debian|Debian|")})
        if mirrors:
            return mirrors[0]
    raise RuntimeError("apt's sources name no Debian archive")


def install_mmdebstrap() -> None:
    """Install the tool that makes Debian roots, if it is missing."""
    if not shutil.which("mmdebstrap"):
        subprocess.run(["apt-get", "-qq", "update"], check=False)  # another archive's trouble need not be ours
        subprocess.run(["apt-get", "-qq", "install", "--yes", "--no-install-recommends", "mmdebstrap"], check=True)


def debian_root(kind: str) -> Path:
    """The root folder of a ``node`` or of a ``base`` for the image (see node/build-root.sh)."""
    script = HERE / "node" / "build-root.sh"

    def build(destination: Path) -> None:
        install_mmdebstrap()
        # In namespaces of its own, so that no mount and no process outlives a builder that was killed.
        own = "setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc --propagation private"
        command = [*own.split(), "bash", str(script), kind, str(destination), debian_mirror()]
        log = folder() / f"{kind}.log"
        with open(log, "w") as out:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"the {kind} root could not be built; see {log}")

    return cached(kind, key_of(script), build)
