"""The study: what is asked, typed and validated. One TOML file, `study.toml`, describes it whole.

Every setting has one place, one default and one line of help here. Unknown keys, wrong types and values out of
range are bad input and are named with table and key.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmrhpc import files
from cmrhpc.errors import BadInput
from cmrhpc.names import METRICS
from cmrhpc.typed import build, element, setting, unknown

STUDIES = Path(__file__).parent / "studies"
MUTATIONS = ("minimax", "heuristic", "least-squares")


@dataclass(frozen=True)
class Data:
    """Which raw images and how they become the cohort (METHODS M1)."""

    raw: str  # raw folder; a relative path starts at the workspace
    table: str = "cohort.csv"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)  # our name -> the table's name
    file_spacing_mm: float | None = setting(None, low=1e-3, high=1e3)  # for files that hold no spacing
    spacing_mm: float = setting(1.172, low=1e-3, high=1e3)  # in-plane spacing after resampling
    image_size: int = setting(80, low=16, high=512)  # pixels along each side
    channels: int = setting(1, low=1, high=3)  # 1 or 3
    roi: str = setting("mask", choices=("mask", "centre", "whole"))
    normalise: str = setting("auto", choices=("auto", "percentile"))  # auto: the table's window where it gives one
    pseudonyms: bool = True  # replace patient ids


@dataclass(frozen=True)
class Folds:
    """Cross-validation (METHODS M2)."""

    k: int = setting(5, low=2, high=100)
    repeats: int = setting(5, low=1, high=100)
    group_by: str = setting("patient", choices=("patient", "image"))  # image: as in the papers, and leaking
    validation_fraction: float = setting(0.2, low=0.01, high=0.9)  # share of the training patients


@dataclass(frozen=True)
class Affine:
    """Affine augmentation (METHODS M3)."""

    factor: int = setting(8, low=1, high=64)  # images after expansion per real image, the real one included


@dataclass(frozen=True)
class Generator:
    """One generator: its networks, its evolution (METHODS M4 to M8). The defaults are DAE-GAN."""

    networks: str = setting("residual", choices=("residual", "dcgan"))
    base_channels: int = setting(32, low=4, high=512)
    generations: int = setting(5000, low=1)
    batch: int = setting(32, low=2, high=4096)
    scoring_batch: int = setting(64, low=2, high=4096)
    discriminator_steps: int = setting(1, low=1, high=100)  # D updates per generation
    mutations: tuple[str, ...] = setting(MUTATIONS, choices=MUTATIONS)
    survivors: int = setting(1, low=1, high=16)
    gamma: float = setting(0.1, low=0.0)  # weight of the diversity fitness F_d
    mixup_alpha: float = setting(0.2, low=0.0)  # 0 turns mixup off
    components: int = setting(10, low=1, high=1000)  # K of the latent mixture
    latent_dim: int = setting(100, low=1, high=4096)
    learning_rate: float = setting(2e-4, low=1e-8, high=1.0)
    beta1: float = setting(0.5, low=0.0, high=0.9999)
    beta2: float = setting(0.999, low=0.0, high=0.999999)
    training_noise: str = setting("shared", choices=("shared", "per_mutation"))
    ema: float = setting(0.0, low=0.0, high=0.999999)  # decay of the averaged generator; 0 turns it off
    max_ratio: float = setting(5.0, low=0.0, high=100.0)  # synthetic images kept per real image
    expand: bool = True  # train on the affine-expanded training set
    conditional: bool = False  # one model over all classes (ACGAN)
    diffaugment: bool = False
    spectral_norm: bool = False
    r1: float = setting(0.0, low=0.0)
    log_every: int = setting(50, low=1)
    external: str = ""  # folder of images that something else made; then only max_ratio counts beside it


@dataclass(frozen=True)
class Refiner:
    """SimGAN refiner (METHODS M9)."""

    channels: int = setting(32, low=4, high=512)
    lambda_l1: float = setting(0.5, low=0.0)  # on the per-pixel mean of |R(x) - x|
    learning_rate: float = setting(1e-3, low=1e-8, high=1.0)
    momentum: float = setting(0.0, low=0.0, high=0.999)
    batch: int = setting(32, low=2, high=4096)
    buffer: int = setting(1024, low=2)
    steps: int = setting(2000, low=1)  # phase 2
    pretrain_refiner: int = setting(500, low=0)
    pretrain_discriminator: int = setting(100, low=0)
    refiner_steps: int = setting(2, low=1, high=1000)  # R updates per D update
    pretrain: str = setting("full", choices=("full", "self"))
    expand: bool = False  # real images: the affine-expanded training set
    log_every: int = setting(50, low=1)


@dataclass(frozen=True)
class Classifier:
    """One classifier and its step budget, equal for all arms (METHODS M10)."""

    network: str = setting("resnet50", choices=("resnet50", "xception"))
    steps: int = setting(1000, low=1)
    batch: int = setting(32, low=2, high=4096)
    validate_every: int = setting(50, low=1)
    learning_rate: float = setting(1e-4, low=1e-8, high=1.0)
    weights: str = ""  # local safetensors file to start from


@dataclass(frozen=True)
class Compute:
    """How the arithmetic is done. A study setting, because it decides the last bits of every result."""

    mode: str = setting("exact", choices=("exact", "fast"))  # fast: bfloat16 where that is native
    threads: int = setting(2, low=1, high=1024)  # per task, never taken from the allocation
    deterministic: bool = True
    checkpoint_seconds: float = setting(600.0, low=0.0)


@dataclass(frozen=True)
class Arm:
    """One way to make a classifier's training set, at one or more ratios (synthetic per real image and class)."""

    name: str
    ratios: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Primary:
    """The one comparison declared before the study runs; every other one is exploratory."""

    classifier: str
    arm: str
    ratio: float = setting(0.0, low=0.0)
    versus: str = "none"  # or affine
    metric: str = setting("accuracy", choices=METRICS)


@dataclass(frozen=True)
class Study:
    """A whole study. `classes[1]` is the positive class of a binary study."""

    name: str
    classes: tuple[str, ...]
    data: Data
    arms: tuple[Arm, ...]
    primary: Primary
    generators: dict[str, Generator]
    refiners: dict[str, Refiner]
    classifiers: dict[str, Classifier]
    seed: int = setting(0, low=0, high=2**63 - 1)
    folds: Folds = dataclasses.field(default_factory=Folds)
    affine: Affine = dataclasses.field(default_factory=Affine)
    compute: Compute = dataclasses.field(default_factory=Compute)

    def to_json(self) -> dict[str, Any]:
        """The resolved study, every default filled in, as JSON-able values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_share(self) -> dict[str, Any]:
        """As `to_json`, without the paths of the raw and external folders: for files that leave the workspace."""
        values = self.to_json()
        for generator in values["generators"].values():
            generator["external"] = generator["external"] and "(not told)"
        return values | {"data": values["data"] | {"raw": ""}}

    @staticmethod
    def from_json(values: dict[str, Any], where: str = "study") -> Study:
        """The study that `to_json` wrote. Raises BadInput when it is not one."""
        return _check_study(build(Study, values, where, ""), where)


# What each generator is; a study's own [generators.NAME] table changes single settings.
_PLAIN = {"networks": "dcgan", "mixup_alpha": 0.0, "components": 1}
GENERATORS: dict[str, dict[str, Any]] = {
    "dae-gan": {},
    # Batch norm lets D saturate, and then F_d rewards offspring that change nothing: at 0.1 it decides alone.
    "egan": _PLAIN | {"gamma": 0.01},
    "dcgan": _PLAIN | {"mutations": ["heuristic"]},
    "acgan": _PLAIN | {"mutations": ["heuristic"], "conditional": True},
}
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")  # of an external generator: a folder, and a part of an arm's name
REFINERS: dict[str, dict[str, Any]] = {"simgan": {}}
CLASSIFIERS: dict[str, dict[str, Any]] = {"resnet50": {"network": "resnet50"}, "xception": {"network": "xception"}}


@dataclass(frozen=True)
class ArmParts:
    """What an arm's name says: GENERATOR[+REFINER][+affine], affine, repeat-real[+affine] or none."""

    generator: str | None
    refiner: str | None
    repeat_real: bool
    affine: bool


def arm_parts(name: str, study: Study, where: str = "") -> ArmParts:
    """Read an arm's name. Raises BadInput for a name that the study cannot make."""
    parts = name.split("+")
    affine = parts[-1] == "affine"
    rest = parts[:-1] if affine else parts
    if not rest or (rest == ["none"] and not affine):
        return ArmParts(None, None, False, affine)
    if rest == ["repeat-real"]:
        return ArmParts(None, None, True, affine)
    if rest[0] in study.generators and (len(rest) == 1 or (len(rest) == 2 and rest[1] in study.refiners)):
        return ArmParts(rest[0], rest[1] if len(rest) == 2 else None, False, affine)
    raise BadInput(
        f'unknown arm "{name}"',
        where,
        "an arm is none, affine, repeat-real, GENERATOR or GENERATOR+REFINER, the last three also with +affine; "
        f"generators: {', '.join(study.generators)}; refiners: {', '.join(study.refiners)}",
    )


def load_study(path: str | Path) -> Study:
    """Read and validate a study file. Raises BadInput with table, key and mend."""
    path = Path(path)
    try:
        text = files.read_plain(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the study file: {error}", str(path), "make one with `cmrhpc init`") from None
    return parse_study(text, str(path))


def parse_study(text: str, where: str = "study.toml") -> Study:
    """As `load_study`, from the text of the file."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise BadInput(f"not valid TOML: {error}", where, "mend the line that is named") from None
    for table, presets in (("generators", GENERATORS), ("refiners", REFINERS), ("classifiers", CLASSIFIERS)):
        named = values.setdefault(table, {})
        if not isinstance(named, dict) or not all(isinstance(v, dict) for v in named.values()):
            raise BadInput(f"[{table}] must hold tables", f"{where} [{table}]", f"write [{table}.NAME]")
        for name, own in named.items():
            if table == "generators" and "external" in own:
                _check_external(name, own, f"{where} [generators.{name}]")
                continue
            if name not in presets:
                raise unknown(name, presets, f"{where} [{table}]")
            named[name] = presets[name] | own
    return _check_study(build(Study, values, where, ""), where)


def _check_external(name: str, own: dict[str, Any], where: str) -> None:
    """An external generator has a name of its own and no settings of training."""
    taken = (*GENERATORS, *REFINERS, "none", "affine", "repeat-real", "real")  # real: a figure of the report
    if name in taken or not _NAME.fullmatch(name):
        mend = "lower-case letters, digits, - and _, at most 40, and none of ours: for example stylegan"
        raise BadInput(f'"{name}" cannot name an external generator', where, mend)
    if not own["external"]:
        raise BadInput("external names no folder", where, 'write external = "FOLDER"')
    if more := sorted(own.keys() - {"external", "max_ratio"}):
        what = f"an external generator is not trained here, so it has no {', '.join(more)}"
        raise BadInput(what, where, "keep external and max_ratio alone")


def _check_study(study: Study, where: str) -> Study:
    """The rules that no single field can check."""

    def wrong(what: str, key: str, mend: str) -> BadInput:
        return BadInput(what, f"{where} {key}", mend)

    if len(study.classes) < 2 or len(set(study.classes)) != len(study.classes):
        raise wrong(f"a study needs two or more different classes, not {list(study.classes)}", "classes", "name each")
    if study.data.channels == 2:
        raise wrong("channels must be 1 or 3", "[data] channels", "1 for grey images, 3 for colour")
    for name, generator in study.generators.items():
        if generator.conditional and (generator.networks != "dcgan" or generator.mixup_alpha):
            mend = 'set networks = "dcgan" and mixup_alpha = 0'
            raise wrong("only dcgan networks without mixup are conditional", f"[generators.{name}]", mend)
    if any(not generator.external for generator in study.generators.values()):
        start_and_ups(study.data.image_size, where)
    if not study.classifiers:
        raise wrong("no classifier", "[classifiers]", "add [classifiers.resnet50]")
    if not study.arms:
        raise wrong("no arm", "[[arms]]", "add at least the arm none")
    cells: dict[tuple[str, str], tuple[str, float]] = {}  # by what the path of a cell tells of it
    for number, arm in enumerate(study.arms, 1):
        key = element("arms", number, arm.name)
        parts = arm_parts(arm.name, study, f"{where} {key}")
        if not arm.ratios or len(set(arm.ratios)) != len(arm.ratios):
            raise wrong(f'arm "{arm.name}" needs different ratios', key, "for example ratios = [1, 3]")
        for ratio in arm.ratios:
            if not 0 <= ratio <= 100:
                raise wrong(f"ratio {ratio:g} is out of range", key, "use 0 to 100")
            limit = study.generators[parts.generator].max_ratio if parts.generator else 100
            if ratio > limit:
                mend = f"raise max_ratio in [generators.{parts.generator}] or lower the ratio"
                raise wrong(f'ratio {ratio:g} of "{arm.name}" is above max_ratio {limit:g}', key, mend)
            if not parts.generator and not parts.repeat_real and ratio:
                raise wrong(f'arm "{arm.name}" takes no ratio', key, "remove its ratios")
            cell = cell_of(arm.name, ratio, parts)
            if cells.setdefault((cell[0], f"{cell[1]:g}"), cell) != cell:
                what = f'two ratios of "{arm.name}" are {ratio:g} to six digits, the path of their shards'
                raise wrong(what, key, "keep one of them")
    for name, ratio in ((study.primary.arm, study.primary.ratio), (study.primary.versus, 0.0)):
        parts = arm_parts(name, study, f"{where} [primary]")
        if cell_of(name, ratio, parts) not in cells.values():
            raise wrong(
                f'the primary comparison names "{name}" at ratio {ratio:g}, which is not an arm of the study',
                "[primary]",
                "add it under [[arms]] or name another",
            )
    if study.primary.versus not in ("none", "affine"):
        what = f'the primary comparison is made with none or affine, not "{study.primary.versus}"'
        raise wrong(what, "[primary] versus", 'write versus = "none" or versus = "affine"')
    compared = cell_of(study.primary.arm, study.primary.ratio, arm_parts(study.primary.arm, study))
    if compared == (study.primary.versus, 0.0):
        raise wrong("the primary comparison is of an arm with itself", "[primary]", "name another arm, ratio or versus")
    if compared == ("none", 0.0):
        mend = 'write arm = "affine" and versus = "none", the same comparison seen from the other side'
        raise wrong("none is what others are compared with", "[primary] arm", mend)
    if study.primary.classifier not in study.classifiers:
        raise unknown(study.primary.classifier, study.classifiers, f"{where} [primary] classifier")
    for name, generator in study.generators.items():
        if len(set(generator.mutations)) != len(generator.mutations) or not generator.mutations:
            mend = f"choose from {', '.join(MUTATIONS)}, each once"
            raise wrong("mutations must be different, and at least one", f"[generators.{name}] mutations", mend)
    return study


MAX_UPS = 4  # times a generator doubles the resolution
STARTS = range(4, 17)  # sizes of the image that it starts from


def start_and_ups(image_size: int, where: str = "study.toml") -> tuple[int, int]:
    """(start, ups) with image_size = start * 2**ups, 1 <= ups <= 4, 4 <= start <= 16 and ups as large as can be.

    80 -> (5, 4), 40 -> (5, 3). Raises BadInput, naming the nearest sizes that work, when there is no such pair.
    """
    for ups in range(MAX_UPS, 0, -1):
        start, rest = divmod(image_size, 2**ups)
        if not rest and start in STARTS:
            return start, ups
    sizes = sorted({start * 2**ups for start in STARTS for ups in range(1, MAX_UPS + 1)})
    near = sorted(sorted(sizes, key=lambda size: (abs(size - image_size), size))[:4])
    raise BadInput(
        f"image size {image_size} does not fit the generator networks",
        f"{where} [data] image_size",
        f"use start * 2^u with u of 1 to 4 and start of 4 to 16; near it: {', '.join(map(str, near))}",
    )


def cell_of(name: str, ratio: float, parts: ArmParts) -> tuple[str, float]:
    """The (arm, ratio) that is trained: ratio 0 of any arm with synthetic images is the arm none (or affine)."""
    if ratio == 0 and (parts.generator or parts.repeat_real):
        return ("affine" if parts.affine else "none", 0.0)
    return (name, ratio)
