"""Synthetic images that something else made: where they lie, and one hash per place.

The folder of an external generator holds one folder per place, `fold0_repeat0_class1`, or one per class, `class1`, that
serves every fold. Which files belong to a place, and their content, is what `SHA256SUMS` says, the list that
`sha256sum` writes: planning reads this one file and touches no image.
"""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cmrhpc import files
from cmrhpc.errors import BadInput
from cmrhpc.hashing import sha256_file, sha256_of
from cmrhpc.planning import Task

SUMS = "SHA256SUMS"
DECLARATION = "train_ids.csv"
TABLE = "images.csv"
MAKE_SUMS = f"make it again: cd FOLDER && find . -type f ! -name {SUMS} -exec sha256sum {{}} + > {SUMS}"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")


@dataclass(frozen=True)
class Place:
    """The files of one fold, repeat and class. name: the folder's, below `root`; files: name -> sha256, sorted."""

    root: Path
    name: str
    files: dict[str, str]

    @property
    def content_sha256(self) -> str:
        """Hash over names and content of all files. The place's own name decides nothing."""
        return sha256_of(self.files)

    @property
    def images(self) -> list[str]:
        """Names of the image files, in the order in which ratios use them."""
        return [name for name in self.files if name not in (DECLARATION, TABLE)]

    def path(self, name: str) -> Path:
        return self.root / self.name / name

    def where(self, name: str) -> str:
        return f"{self.name}/{name}"

    def damage(self) -> str:
        """The first file that is not what `SHA256SUMS` says, in words; empty when all are. Reads every file."""
        folder = self.root / self.name
        try:
            there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
            for name in sorted(there ^ self.files.keys()):
                return f"{self.where(name)} is {f'not in {SUMS}' if name in there else 'missing'}"
            for name, told in self.files.items():
                if os.path.realpath(folder / name) != os.path.join(os.path.realpath(self.root), self.name, name):
                    return f"{self.where(name)} is reached through a link, which is not followed"
                if sha256_file(folder / name) != told:
                    return f"{self.where(name)} is not the file that {SUMS} names"
        except OSError as error:
            return f"{self.name} cannot be read: {error.strerror}"
        return ""


def input_name(task: Task) -> str:
    """What an external task's shard calls its images among its inputs."""
    return f"external/{Path(task.output).stem}"


def read_sums(root: Path) -> dict[str, dict[str, str]]:
    """Folder -> file name -> sha256, both sorted; files that lie higher or deeper, or are hidden, do not count.

    Raises BadInput when the list is missing, cannot be read, or names a file twice.
    """
    path = root / SUMS
    found: dict[str, dict[str, str]] = {}
    try:
        lines = files.read_plain(path, follow=False).decode().splitlines()
    except FileNotFoundError:
        raise BadInput(f"no {SUMS} among the external images", "", MAKE_SUMS, str(path)) from None
    except UnicodeDecodeError:
        raise BadInput(f"{SUMS} is not UTF-8 text", "", MAKE_SUMS, str(path)) from None
    except OSError as error:
        raise BadInput(f"cannot read {SUMS}: {error.strerror}", "", MAKE_SUMS, str(path)) from None
    for number, line in enumerate(lines, 1):
        if not (match := _LINE.fullmatch(line)):
            raise BadInput("not a line of sha256sum", f"{SUMS} line {number}", MAKE_SUMS, f"{path}: {line[:80]!r}")
        folder, _, name = match[2].partition("/")
        if not name or "/" in name or folder == ".." or name.startswith("."):
            continue
        listed = found.setdefault(folder, {})
        if name in listed:
            raise BadInput("a file is listed twice", f"{SUMS} line {number}", MAKE_SUMS, str(path))
        listed[name] = match[1].lower()
    return {folder: dict(sorted(found[folder].items())) for folder in sorted(found)}


def place_of(root: Path, sums: dict[str, dict[str, str]], task: Task) -> Place:
    """The place that serves a synthesize task: that of its fold, repeat and class, else that of its class.

    Raises BadInput when there is neither, or no image or no declaration in it.
    """
    names = [Path(task.output).stem, f"class{task.label}"]
    for name in names:
        if name in sums:
            place = Place(root, name, sums[name])
            if DECLARATION not in place.files:
                mend = f"list there the ids of the real images that training saw (column id), then {MAKE_SUMS}"
                raise BadInput(f"no {DECLARATION}: what was the generator trained on?", name, mend, str(root))
            if not place.images:
                raise BadInput("no image", name, f"put images there, then {MAKE_SUMS}", str(root))
            return place
    raise BadInput(f"no folder {' or '.join(names)} in {SUMS}", SUMS, f"put images there, then {MAKE_SUMS}", str(root))


def read_columns(path: Path, where: str) -> tuple[list[str], list[dict[str, str]]]:
    """Heading and rows of a small CSV file. Raises BadInput when it is none."""
    try:
        text = files.read_plain(path, follow=False).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return list(reader.fieldnames or ()), [
            {key: (value or "").strip() for key, value in row.items() if key} for row in reader
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read the table: {told}", where, "save it as CSV with the encoding UTF-8") from None
