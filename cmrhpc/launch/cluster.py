"""What `cmrhpc doctor` finds on a login node: Slurm, Apptainer, the image, the shared file system, clocks and disks.

Asks programs with a time limit. Writes only temporary files in the workspace, and removes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cmrhpc import files, shards
from cmrhpc.errors import BadInput
from cmrhpc.findings import Finding, finding
from cmrhpc.launch import slurm
from cmrhpc.launch.send import other_version, read_elsewhere
from cmrhpc.launch.slurm import Partition
from cmrhpc.launch.submit import limits_for
from cmrhpc.paths import check_for_bind, check_for_slurm, expanded
from cmrhpc.planning import STAGES
from cmrhpc.workspace import Workspace

if TYPE_CHECKING:
    from cmrhpc.profile import Profile

GIB = 2**30
SKEW_S = 5.0  # file systems count time in steps, Slurm answers in whole seconds
BUILD_GIB, CACHE_GIB, TEMPORARY_GIB = 12, 2, 0.1
DOCS = "see docs/clusters.md"


def slurm_findings(profile: Profile | None) -> list[Finding]:
    """Version, controller, accounting, limits, and each partition with its time limit and GPUs.

    Needed by whoever names a profile: that is who wants to submit.
    """
    submits = profile is not None
    version = slurm.version()
    if version is None:
        return [finding(False, "Slurm is not here", "only for submit: use a login node", submits)]
    found = [finding(True, f"Slurm {version}")]
    config = slurm.config()
    if config is None:
        mend = "wait and try again, or set CMRHPC_SLURM_SECONDS; when it lasts, ask the cluster's administrator"
        what = f"Slurm's controller does not answer within {slurm.patience():.0f} s"
        return [*found, finding(False, what, mend, submits)]
    found += [_accounting(config), _limits(profile), *_clock(config)]
    return found + _partitions(slurm.partitions() or [], profile)


def _accounting(config: dict[str, str]) -> Finding:
    if config.get("AccountingStorageType", "(null)").rpartition("/")[2] in ("none", "(null)"):
        return finding(True, "accounting is off: status tells from the queue and the tasks' own records")
    works = slurm.ask(["sacct", "--noheader", "--allocations", "--format=jobid"]).code == 0
    what = f"accounting {'is on' if works else 'does not answer'}"
    return finding(works, what, "status works without; tell the administrator", needed=False)


def _limits(profile: Profile | None) -> Finding:
    limits = limits_for(profile) if profile else slurm.limits()
    words = [f"arrays of {limits.max_array_size or '?'} tasks at most"]
    words += [f"{limits.max_jobs} jobs in all"] if limits.max_jobs else []
    words.append("no submit limit found" if limits.max_submit is None else f"you may have {limits.max_submit} queued")
    enough = limits.max_submit is None or limits.max_submit > 0
    mend = "this account may not submit: name another in the profile"
    return finding(enough, f"limits: {', '.join(words)}", mend, needed=profile is not None)


def _clock(config: dict[str, str]) -> list[Finding]:
    told = slurm.controller_time(config)
    return [] if told is None else [_skew("the controller's clock", told - time.time())]


def _skew(whose: str, seconds: float) -> Finding:
    mend = "its administrator should run NTP: records and job times cannot be compared"
    if abs(seconds) <= SKEW_S:
        return finding(True, f"{whose} agrees with this machine's", needed=False)
    what = f"{whose} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
    return finding(False, what, mend, needed=False)


def _partitions(partitions: list[Partition], profile: Profile | None) -> list[Finding]:
    found = []
    places = list(_sent_to(partitions, profile).values()) if profile else []
    up = {partition.name for partition in partitions if partition.up}
    for partition in partitions:
        gpus = ", ".join(kind for kind in partition.gres if kind.startswith("gpu")) or "no GPUs"
        default = " (default)" if partition.default else ""
        what = f"partition {partition.name}{default}: {partition.nodes} nodes, {gpus}, at most {partition.time_limit}"
        needed = any(partition.name in names and not up.intersection(names) for names in places)
        what += "" if partition.up else ", is down"
        found.append(finding(partition.up, what, "use another for now", needed))
    if profile:
        found += _asked_for(partitions, profile)
    if partitions and not _have_gpus(partitions):
        asked = profile is not None and any(profile.gpus(stage) for stage in STAGES)
        mend = "tasks compute on CPUs: leave gres empty in the profile"
        found.append(finding(False, "no partition has GPUs", mend, asked))
    return found


def _sent_to(partitions: list[Partition], profile: Profile) -> dict[str, list[str]]:
    """Stage -> names of the partitions of which one is to take it."""
    default = [partition.name for partition in partitions if partition.default]
    places = {stage: profile.slurm_of(stage).partition for stage in STAGES}
    return {stage: place.split(",") if place else default for stage, place in places.items()}


def _asked_for(partitions: list[Partition], profile: Profile) -> list[Finding]:
    """What the profile asks for and its partitions do not have; nothing where they have all of it."""
    found = []
    known = {partition.name: partition for partition in partitions}
    who = f"profile {profile.name}"
    named = _sent_to(partitions, profile)
    for name in dict.fromkeys(name for names in named.values() for name in names if name not in known):
        mend = f"name one of {', '.join(known)} in the profile" if known else "ask the administrator"
        found.append(finding(False, f"{who}: there is no partition {name}", mend))
    for stage, names in named.items():
        # Of several partitions Slurm takes one that has what is asked for.
        here = [known[name] for name in names if name in known]
        if not here:
            continue
        ask, where = profile.resources(stage), ",".join(partition.name for partition in here)
        if all(ask.seconds > partition.most_seconds for partition in here):
            gives = ", ".join(dict.fromkeys(partition.time_limit for partition in here))
            what = f"{who}: {stage} asks for {ask.time}, partition {where} gives {gives}"
            found.append(finding(False, what, "ask for less: a task that runs out of time goes on from its checkpoint"))
        kinds = {kind.split(":")[1] for partition in here for kind in partition.gres if kind.count(":") > 1}
        first = ask.gres.split(",")[0]
        kind = _gpu_type(first.removeprefix("gpu:") if first.startswith("gpu:") else ask.gpus)
        if kind and kinds and kind not in kinds:
            what = f"{who}: {stage} asks for GPU type {kind}, partition {where} has {', '.join(sorted(kinds))}"
            found.append(finding(False, what, "name a type that is there, or none: gpu:1"))
        if profile.gpus(stage) and _have_gpus(partitions) and not _have_gpus(here):
            what = f"{who}: {stage} asks for a GPU, partition {where} has none"
            found.append(finding(False, what, f"give [stages.{stage}] a partition with GPUs, or leave gres empty"))
    return found


def _have_gpus(partitions: list[Partition]) -> bool:
    return any(kind.startswith("gpu") for partition in partitions for kind in partition.gres)


def _gpu_type(text: str) -> str:
    """The type that `2`, `a100` or `a100:2` name; empty where none."""
    kind = text.partition(":")[0]
    return "" if kind.isdigit() else kind


# ---------------------------------------------------------------- the container


def container_findings(profile: Profile | None) -> list[Finding]:
    """Apptainer, user namespaces, and the image that the profile or CMRHPC_CONTAINER names."""
    found = []
    answer = slurm.ask(["apptainer", "--version"])
    if answer.code != 0:
        mend = "only for the container: `module load apptainer`, or submit from a virtual environment"
        found.append(finding(False, "Apptainer is not here", mend, needed=False))
    else:
        found += [finding(True, answer.out.strip()), _namespaces()]
    image = profile.container.image if profile else os.environ.get("CMRHPC_CONTAINER", "")
    if image:
        found += _image(Path(image))
        options = profile.container.options if profile else os.environ.get("CMRHPC_CONTAINER_OPTIONS", "").split()
        if os.path.exists(image) and (differs := other_version(image, options)):
            found.append(finding(False, differs, "build it from this clone, or install its version here", needed=False))
    return found + (_binds(profile) if profile else [])


def _binds(profile: Profile) -> list[Finding]:
    """Sources of binds that are missing here; nothing where all are there."""
    sources = [bind.partition(":")[0] for bind in profile.container.binds]
    mend = "make it, or take it out of binds: where it is missing no container starts (compute nodes may have it)"
    return [
        finding(False, f"profile {profile.name}: {source} of binds is not here", mend, needed=False)
        for source in sources
        if not os.path.exists(source)
    ]


def _namespaces() -> Finding:
    if slurm.ask(["unshare", "--user", "true"]).code == 0:
        return finding(True, "user namespaces work: images can be run and built here")
    place = re.search(r"^LIBEXECDIR=(.+)$", slurm.ask(["apptainer", "buildcfg"]).out, flags=re.MULTILINE)
    starter = Path(place[1] if place else "/usr/libexec", "apptainer/bin/starter-suid")
    if starter.is_file() and starter.stat().st_mode & 0o4000 and starter.stat().st_uid == 0:
        return finding(True, "no user namespaces, but Apptainer is setuid: images can be run here, not built")
    what = "no user namespaces, and Apptainer is not setuid: no image runs here"
    return finding(False, what, f"use no container: {DOCS}", needed=False)


def _image(image: Path) -> list[Finding]:
    if not image.exists():
        return [finding(False, f"no image {image}", "containers/build.sh, or copy it: " + DOCS)]
    checksum = Path(f"{image}.sha256")
    if not checksum.is_file():
        return [finding(False, f"image {image}: no checksum beside it", f"copy {checksum.name} too, or: sha256sum")]
    try:
        told = (checksum.read_text(encoding="utf-8").split() or [""])[0]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        return [finding(False, f"{checksum} cannot be read: {why}", "mend its access, or copy it again")]
    if image.is_dir():
        return [finding(True, f"image {image}: an unpacked folder, which carries the checksum {told[:12]}...")]
    try:
        with open(image, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return [finding(False, f"image {image} cannot be read: {error.strerror}", "mend its access")]
    mend = "it was cut or changed on the way: copy it again, with its checksum"
    return [
        finding(digest == told, f"image {image}: its checksum {'holds' if digest == told else 'does not hold'}", mend)
    ]


# ---------------------------------------------------------------- files and disks


def path_findings(workspace: Path, profile: Profile | None) -> list[Finding]:
    """Paths that Slurm or Apptainer would misread; nothing where there is none."""
    bound = []
    if profile and profile.container.image:
        bound = [workspace.resolve()]
        with contextlib.suppress(BadInput):  # a folder that is no workspace yet
            known = Workspace(workspace)
            for stage in STAGES:
                bound += [path for pair in read_elsewhere(known, stage).items() for path in pair]
    found: list[Finding] = []
    for check, path in [(check_for_slurm, workspace.absolute()), *((check_for_bind, path) for path in bound)]:
        try:
            check(path)
        except BadInput as error:
            told = finding(False, f"{error.where}: {error.what}", error.mend, needed=profile is not None)
            found += [told] if told not in found else []
    return found


def folder_findings(workspace: Path) -> list[Finding]:
    """Whether a shared file system keeps what the workspace rests on, and tells the time."""
    try:
        with tempfile.TemporaryDirectory(dir=workspace, prefix=".doctor") as name:
            folder = Path(name)
            before = time.time()
            files.atomic_write(folder / "file", "one")
            after = time.time()
            written = (folder / "file").stat().st_mtime
            files.atomic_write(folder / "file", "two")
            renames = (folder / "file").read_text() == "two" and len(os.listdir(folder)) == 1
            mend = "put the workspace on another file system"
            found = [finding(renames, f"{workspace} is writable and renames in one step", mend), _links(folder, mend)]
            found.append(_shard(folder, mend))
        free = shutil.disk_usage(workspace).free / GIB
    except (OSError, BadInput) as error:
        why = error.what if isinstance(error, BadInput) else error.strerror
        return [finding(False, f"{workspace}: {why}", "mend its access, or choose another folder")]
    found.append(finding(free >= 1, f"{workspace} has {free:.0f} GiB free", "free some space"))
    off = written - before if written < before else max(0.0, written - after)
    return [*found, _skew("the file system's clock", off)]


def _links(folder: Path, mend: str) -> Finding:
    try:
        first, second = files.create_once(folder / "once", "1"), files.create_once(folder / "once", "2")
    except BadInput as error:
        return finding(False, f"exclusive file creation does not work: {error.what}", mend)
    right = first and not second
    return finding(right, f"exclusive file creation {'works' if right else 'does not work'}", mend)


def _shard(folder: Path, mend: str) -> Finding:
    """The HDF5 library asks more of a file system than plain files do."""
    try:
        shards.write_shard(
            folder / "a.h5", {"id": shards.text_array("a")}, schema="1", task={}, settings={}, inputs={}, seed=0
        )
        shards.read_shard(folder / "a.h5")
    except (BadInput, ImportError) as error:
        return finding(False, f"no shard can be written: {getattr(error, 'what', error)}", mend)
    return finding(True, "a shard can be written and read here")


def disk_findings() -> list[Finding]:
    """Free space where programs write besides the workspace."""
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    found = [_space("TMPDIR", temporary, TEMPORARY_GIB, "programs write there") | {"needed": True}]
    if shutil.which("apptainer"):
        build = Path(os.environ.get("APPTAINER_TMPDIR") or temporary)
        found.append(_space("APPTAINER_TMPDIR", build, BUILD_GIB, "building the image needs it"))
        cache = Path(os.environ.get("APPTAINER_CACHEDIR") or expanded("~/.apptainer/cache"))
        purpose = "a base image from a registry is kept there"
        found.append(_space("APPTAINER_CACHEDIR", cache, CACHE_GIB, purpose, made=True))
    return found


def _space(name: str, folder: Path, gib: float, purpose: str, made: bool = False) -> Finding:
    """Free space of a folder. made: the program makes the folder itself, so that the one above it will do."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists() or not made), folder)
    mend = f"{purpose}: set {name} to a folder with {gib} GiB or more; {DOCS}"
    if not there.is_dir():
        wrong = "is not a folder" if there.exists() else "does not exist"
        return finding(False, f"{name} {folder} {wrong}", mend, needed=False)
    if not os.access(there, os.W_OK | os.X_OK):
        return finding(False, f"{name} {folder} cannot be written to", mend, needed=False)
    free = 0.0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(there).free / GIB
    return finding(free >= gib, f"{name} {folder}: {free:.1f} GiB free", mend, needed=False)
