"""The container image of the tests: the project's own definition and full lock, over a local base."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.cluster import cache
from tests.cluster.node import HPC, Bind, Node

PROJECT = cache.HERE.parents[1]
CONTAINERS = PROJECT / "containers"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "cmrhpc", "containers")
# Where a node of the tests sees the image and the working tree, and the option that puts that code in place of the
# image's, so that a change of the code needs no new image.
SIF = "/images/cmrhpc.sif"
TREE = "/tree"
OVER = f"--bind {TREE}/cmrhpc:/opt/cmrhpc/cmrhpc"
CMRHPC = f"apptainer --quiet exec {OVER} {SIF} cmrhpc"


def sif() -> Path:
    """Path of ``cmrhpc.sif``, its sha256 beside it. Built when the definition or a lock has changed (minutes)."""
    locks = sorted(CONTAINERS.glob("requirements*.txt"))
    return cache.cached("image", cache.key_of(CONTAINERS / "cmrhpc.def", *locks), build) / "cmrhpc.sif"


def binds(image: Path) -> list[Bind]:
    """What a node needs to see for `SIF`, `TREE` and `OVER` to hold."""
    folders = ("cmrhpc", "slurm", "containers")
    return [Bind(image.parent, "/images"), *(Bind(PROJECT / name, f"{TREE}/{name}") for name in folders)]


def build(destination: Path) -> None:
    """Build the image into a folder, as user ``hpc`` in a node that reaches the network as the host does."""
    work = destination.with_name("image.work")
    cache.remove(work)
    built = run_build(work, network_settings())
    log = cache.folder() / "image.log"
    log.write_text(built.stdout + built.stderr)
    if built.returncode:
        raise RuntimeError(f"the image could not be built; see {log}\n{built.stderr[-2000:]}")
    destination.mkdir()
    for name in ("cmrhpc.sif", "cmrhpc.sif.sha256"):
        (work / name).rename(destination / name)
    cache.remove(work)


def run_build(work: Path, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Copy the project into a new folder `work` and run its build.sh there, with these variables set."""
    for folder in (work, work / "tmp", work / "cache"):
        folder.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, work / name)
    for path in work.rglob("*"):
        os.chown(path, HPC, HPC)

    binds = [Bind(cache.debian_root("base"), "/base"), *network_files()]
    local = ["--build-arg", "bootstrap=localimage", "--build-arg", "base=/base"]
    fast = ["--mksquashfs-args", "-comp zstd -Xcompression-level 1"]
    settings = settings | {"APPTAINER_TMPDIR": "/shared/tmp", "APPTAINER_CACHEDIR": "/shared/cache"}
    with Node(shared=work, network="host", slurm=False, binds=binds) as node:
        return node.run(["containers/build.sh", "--", *local, *fast], env=settings, check=False, timeout=1800)


def network_files() -> list[Bind]:
    """Files of the host by which names are resolved, certificates trusted and an index found."""
    home = Path.home()
    wanted = {
        "/etc/resolv.conf": Path("/etc/resolv.conf"),
        "/etc/ssl/certs/ca-certificates.crt": Path("/etc/ssl/certs/ca-certificates.crt"),
        "/etc/pip.conf": Path("/etc/pip.conf"),
        "/home/hpc/.config/pip/pip.conf": home / ".config/pip/pip.conf",
    }
    return [Bind(source, target) for target, source in wanted.items() if source.exists()]


def network_settings() -> dict[str, str]:
    """The host's variables about index, proxy and certificates."""
    words = ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_", "REQUESTS_CA_")
    return {name: value for name, value in os.environ.items() if name.upper().startswith(words)}
