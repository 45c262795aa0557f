"""The profile: a cluster, as `cmrhpc submit` needs to know it. `slurm/profiles/template.toml` explains each key."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cmrhpc.errors import BadInput
from cmrhpc.near import letters
from cmrhpc.paths import expanded
from cmrhpc.typed import build, setting, unknown

# What submit itself decides, and what has a key of its own.
_OURS = {"array", "chdir", "comment", "dependency", "error", "job-name", "kill-on-invalid-dep", "open-mode", "output"}
_OURS |= {
    "nodes",
    "ntasks-per-node",
    "parsable",
    "requeue",
    "no-requeue",
    "signal",
    "test-only",
    "wait",
    "wckey",
    "wrap",
}
# What would keep submit from learning where its jobs are, and what to do instead.
_HIDES = {"cluster": "export SLURM_CLUSTERS=NAME, which squeue and sacct read too, before every cmrhpc command"}
_HIDES |= {"clusters": _HIDES["cluster"], "quiet": "take it out: the number of the job is read from what sbatch prints"}
_KEYS = {"account": "account", "constraint": "constraint", "cpus-per-task": "cpus", "gres": "gres", "mem": "memory"}
_KEYS |= {"partition": "partition", "qos": "qos", "time": "time"}
_BY_STAGE = ("partition", "account", "qos", "constraint", "options")  # of [slurm], what a stage may have its own of
_GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")
# What Slurm and submitit call a key of a stage.
_OTHER_NAMES = {"mem": "memory", "cpuspertask": "cpus", "gpuspernode": "gpus", "timelimit": "time", "walltime": "time"}
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Slurm:
    """What every job asks for, unless its stage says otherwise.

    max_time, max_memory: what a task that ran out of either may be given in the end.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    signal_seconds: int = setting(120, low=10, high=3600)  # warning before the time limit
    max_time: str = ""
    max_memory: str = ""
    options: tuple[str, ...] = ()  # further words for sbatch


@dataclass(frozen=True)
class Container:
    """Inside which image tasks run; without one, in the environment that submits.

    image and the sources of binds: once loaded whole paths, a relative one from the profile's folder.
    """

    image: str = ""
    binds: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # further words for `apptainer exec`


@dataclass(frozen=True)
class Environment:
    """lines: bash, run in the job before its tasks."""

    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What one task asks for; time and memory as Slurm writes them.

    gpus: instead of GPUs in gres, for clusters that take `--gpus-per-node`: `2`, `a100` or `a100:2`. partition to
    options: instead of what [slurm] says, None where that holds.
    """

    time: str
    memory: str
    gres: str
    cpus: int = setting(1, low=1, high=1024)
    gpus: str = ""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    options: tuple[str, ...] | None = None

    @property
    def seconds(self) -> int:
        """The time limit, always a whole number of minutes as Slurm counts it."""
        return -(-time_seconds(self.time) // 60) * 60


@dataclass(frozen=True)
class SharedResources(Resources):
    """The same of a stage whose tasks may share a GPU."""

    tasks_per_gpu: int = setting(1, low=1, high=64)


@dataclass(frozen=True)
class Stages:
    """One per stage."""

    ingest: Resources
    synthesize: SharedResources
    refine: SharedResources
    classify: SharedResources
    aggregate: Resources


# What holds for a stage where a profile says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ingest": {"time": "02:00:00", "cpus": 4, "memory": "8G", "gres": ""},
    "synthesize": {"time": "12:00:00", "cpus": 2, "memory": "8G", "gres": "gpu:1"},
    "refine": {"time": "06:00:00", "cpus": 2, "memory": "8G", "gres": "gpu:1"},
    "classify": {"time": "06:00:00", "cpus": 2, "memory": "16G", "gres": "gpu:1"},
    "aggregate": {"time": "01:00:00", "cpus": 2, "memory": "8G", "gres": ""},
}


@dataclass(frozen=True)
class Profile:
    """A cluster. name: of the file, without its ending."""

    stages: Stages
    name: str
    slurm: Slurm = field(default_factory=Slurm)
    container: Container = field(default_factory=Container)
    environment: Environment = field(default_factory=Environment)

    def resources(self, stage: str) -> Resources:
        return getattr(self.stages, stage)

    def slurm_of(self, stage: str) -> Slurm:
        """[slurm], with what the stage says otherwise."""
        own = {key: getattr(self.resources(stage), key) for key in _BY_STAGE}
        return replace(self.slurm, **{key: value for key, value in own.items() if value is not None})

    def gpus(self, stage: str) -> int:
        """How many GPUs one job of a stage holds."""
        ask = self.resources(stage)
        words = [option.removeprefix("--").partition("=") for option in self.slurm_of(stage).options]
        return gpu_count(ask.gres, [ask.gpus, *(value for name, _, value in words if name in _GPU_OPTIONS)])

    def tasks_per_element(self, stage: str) -> int:
        return getattr(self.resources(stage), "tasks_per_gpu", 1)


def load_profile(name: str | Path) -> Profile:
    """A profile from its path, or by name from `slurm/profiles` of this folder, from `~/.config/cmrhpc/profiles`, or
    from the clone that is installed.

    Raises BadInput with file, table, key and mend.
    """
    path = Path(name)
    if not path.is_file():
        own = Path(os.environ.get("XDG_CONFIG_HOME") or expanded("~/.config")) / "cmrhpc" / "profiles"
        folders = [Path("slurm/profiles"), own, Path(__file__).resolve().parent.parent / "slurm" / "profiles"]
        known = {p.stem: p for folder in reversed(folders) for p in sorted(folder.glob("*.toml"))}
        if str(name) not in known:
            there = f"by name there are: {', '.join(known)}" if known else f"none lie in {folders[0]} or {own}"
            mend = f"give its path, or copy slurm/profiles/template.toml of the clone and fill it in; {there}"
            raise BadInput(f'no such profile "{name}"', str(path), mend)
        path = known[str(name)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the profile: {error}", str(path), "give it read access, as UTF-8") from None
    return parse_profile(text, str(path))


def parse_profile(text: str, where: str = "profile.toml") -> Profile:
    """As `load_profile`, from the text of the file."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise BadInput(f"not valid TOML: {error}", where, "mend the line that is named") from None
    if "name" in values:
        raise unknown("name", [f.name for f in fields(Profile) if f.name != "name"], where)
    stages = values.setdefault("stages", {})
    if not isinstance(stages, dict) or not all(isinstance(v, dict) for v in stages.values()):
        raise BadInput("[stages] must hold tables", f"{where} [stages]", "write [stages.classify]")
    for stage in stages:
        if stage not in _DEFAULTS:
            raise unknown(stage, _DEFAULTS, f"{where} [stages]")
    _check_keys(values, where)
    for stage, default in _DEFAULTS.items():
        own = stages.get(stage, {})
        instead = {"gres": ""} if own.get("gpus") else {}
        stages[stage] = default | instead | own
    container = values.get("container")
    if isinstance(container, dict):
        values["container"] = container | _from_folder(container, Path(where).parent.absolute())
    profile = build(Profile, values | {"name": Path(where).stem}, where, "")
    _check(profile, where)
    return profile


def _check_keys(values: dict[str, Any], where: str) -> None:
    """Raises BadInput for a key that stands above its table, or is called as Slurm calls it."""
    tables = {"[slurm]": Slurm, "[container]": Container, "[environment]": Environment}
    homes = {table: [f.name for f in fields(kind)] for table, kind in tables.items()}
    homes["[stages.STAGE]"] = [f.name for f in fields(SharedResources)]
    for key in values:
        if found := [table for table, keys in homes.items() if key in keys]:
            raise BadInput(f'unknown key "{key}"', where, f"it belongs below {' or '.join(found)}")
    for stage, own in values["stages"].items():
        for key in own:
            if key not in homes["[stages.STAGE]"] and (meant := _OTHER_NAMES.get(letters(key))):
                raise BadInput(f'unknown key "{key}"', f"{where} [stages.{stage}]", f'did you mean "{meant}"?')


def _from_folder(container: dict[str, Any], folder: Path) -> dict[str, Any]:
    """[container] with whole paths: `~` and variables written out, relative ones from a folder."""
    made = dict(container)
    if isinstance(image := container.get("image"), str) and image:
        made["image"] = str(folder / expanded(image))
    if isinstance(binds := container.get("binds"), list):
        made["binds"] = [_bind(bind, folder) if isinstance(bind, str) and bind else bind for bind in binds]
    return made


def _bind(text: str, folder: Path) -> str:
    """SOURCE[:TARGET[:OPTIONS]] with a whole SOURCE."""
    source, sign, rest = expanded(text).partition(":")
    return f"{folder / source}{sign}{rest}"


def _check(profile: Profile, where: str) -> None:
    """The rules that no single field can check."""
    slurm, container = profile.slurm, profile.container
    _check_slurm(slurm, f"{where} slurm")
    for table, words in (("binds", container.binds), ("options", container.options)):
        for i, word in enumerate(words, 1):
            if not word or re.search(r"\s", word) or (table == "binds" and "," in word):
                mend = "one word each" if table == "options" else "a path without spaces or commas, or SOURCE:TARGET"
                raise BadInput(f'"{word}" cannot be passed on', f"{where} container.{table} number {i}", mend)
    if (container.binds or container.options) and not container.image:
        raise BadInput("binds and options are for a container", f"{where} container.image", "name the image")
    for key in ("max_time", "max_memory"):
        if text := getattr(slurm, key):
            (time_seconds if key == "max_time" else memory_mb)(text, f"{where} slurm.{key}")
    for stage in _DEFAULTS:
        asked, place = profile.resources(stage), f"{where} stages.{stage}"
        seconds, memory = time_seconds(asked.time, f"{place}.time"), memory_mb(asked.memory, f"{place}.memory")
        if seconds < 2 * slurm.signal_seconds:
            mend = f"signal_seconds is {slurm.signal_seconds}: ask for at least twice that, or lower it"
            raise BadInput(f"{asked.time} leaves no time to work in", f"{place}.time", mend)
        if slurm.max_time and seconds > time_seconds(slurm.max_time):
            raise BadInput(f"{asked.time} is above max_time {slurm.max_time}", f"{place}.time", "raise max_time")
        if slurm.max_memory and memory > memory_mb(slurm.max_memory):
            raise BadInput(f"{asked.memory} is above max_memory {slurm.max_memory}", f"{place}.memory", "raise it")
        if re.search(r"\s", asked.gres):
            raise BadInput("gres contains a space", f"{place}.gres", 'for example "gpu:1"; empty for none')
        if asked.gpus and not re.fullmatch(r"([A-Za-z][\w.-]*:)?[1-9]\d*|[A-Za-z][\w.-]*", asked.gpus):
            raise BadInput(f'"{asked.gpus}" is not a number of GPUs', f"{place}.gpus", 'write "1" or "a100:1"')
        if asked.gpus and gpu_count(asked.gres, []):
            raise BadInput("asks for GPUs twice", f"{place}.gres", "name them in gres or in gpus")
        _check_slurm(profile.slurm_of(stage), place)


def _check_slurm(slurm: Slurm, place: str) -> None:
    """Words for sbatch, of [slurm] or of a stage."""
    for key in ("partition", "account", "qos", "constraint"):
        if re.search(r"\s", getattr(slurm, key)):
            raise BadInput("has a space in it", f"{place}.{key}", "write one word")
    for i, option in enumerate(slurm.options, 1):
        number, word = f"{place}.options number {i}", option.removeprefix("--").split("=")[0]
        if not re.fullmatch(r"--[a-z][a-z-]*(=.+)?", option):
            raise BadInput(f'"{option}" is not a long option of sbatch', number, 'write "--exclude=node7"')
        if word in _KEYS:
            raise BadInput(f"--{word} has a key of its own", number, f"write {_KEYS[word]} = ...")
        if word in _HIDES:
            raise BadInput(f"--{word} hides the jobs from cmrhpc", number, _HIDES[word])
        if word in _OURS:
            raise BadInput(f"--{word} is decided by cmrhpc submit", number, "take it out")


def gpu_count(gres: str, more: Iterable[str]) -> int:
    """How many GPUs are asked for, by gres (`gpu`, `gpu:2`, `gpu:a100`, `gpu:a100:2`) or more words (`2`, `a100:2`).

    Where several ask for them they mean the same ones.
    """
    found = []
    for part in gres.split(","):
        name, *rest = part.split("(")[0].strip().split(":")
        found.append((int(rest[-1]) if rest and rest[-1].isdigit() else 1) if name == "gpu" else 0)
    told = [word.rpartition(":")[2] for word in more if word]
    return max(sum(found), *(int(word) if word.isdigit() else 1 for word in told), 0)


def time_seconds(text: str, where: str = "time") -> int:
    """Slurm's time as seconds: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises BadInput for anything else."""
    found = _TIME.fullmatch(text)
    numbers = [int(part) for part in found["rest"].split(":")] if found else []
    if found and found["days"]:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        total = int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    elif len(numbers) == 3:
        total = numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    else:
        total = sum(number * unit for number, unit in zip(numbers, (60, 1), strict=False))
    if not 0 < total <= 366 * 86400:
        raise BadInput(f'"{text}" is not a time of Slurm\'s', where, 'write "HH:MM:SS" or "DAYS-HH:MM:SS"')
    return total


def time_text(seconds: int) -> str:
    """Seconds as Slurm writes them: 12:00:00, 2-00:00:00."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def memory_mb(text: str, where: str = "memory") -> int:
    """Slurm's memory as MiB: a number of MiB, or with K, M, G or T. Raises BadInput for anything else."""
    found = _MEMORY.fullmatch(text)
    size = int(found[1]) * {"K": 1, "": 1024, "M": 1024, "G": 1024**2, "T": 1024**3}[found[2].upper()] if found else 0
    if not 1024 <= size <= 2**40:
        raise BadInput(f'"{text}" is not a memory size of Slurm\'s', where, 'write "8G"')
    return size // 1024


def memory_text(mb: int) -> str:
    """MiB as Slurm takes them: 8G, 1500M."""
    return f"{mb // 1024}G" if mb % 1024 == 0 else f"{mb}M"
