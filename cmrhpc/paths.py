"""Which characters of a path something on its way cannot take: sbatch files, Slurm's file names, Apptainer's binds."""

from __future__ import annotations

import os
from pathlib import Path

from cmrhpc.errors import BadInput


def check_printable(path: Path) -> None:
    """Raise BadInput where a path has a control character, which no #SBATCH line can hold, or is not UTF-8 text."""
    if any(ord(c) < 32 or ord(c) == 127 for c in str(path)):
        raise BadInput("control characters in a path", repr(str(path)), "rename the folder")
    if str(path) != os.fsencode(path).decode(errors="replace"):
        raise BadInput("a path that is not UTF-8 text", repr(str(path)), "rename the folder")


def check_for_slurm(workspace: Path) -> None:
    """Raise BadInput where Slurm would take a part of the workspace's path for something else.

    In the names of output files `%` begins a replacement, and a backslash turns all replacements off.
    """
    check_printable(workspace)
    if wrong := sorted(set(str(workspace)) & set("%\\")):
        raise BadInput(
            f"Slurm gives {' and '.join(wrong)} in a path a meaning of its own", str(workspace), "rename the folder"
        )


def check_for_bind(folder: Path) -> None:
    """Raise BadInput where Apptainer would cut a folder's path in two, at `:` or `,`."""
    check_printable(folder)
    if wrong := sorted(set(str(folder)) & set(":,")):
        what = f"Apptainer cannot bind a path with {' and '.join(wrong)}"
        raise BadInput(what, str(folder), "rename the folder")


def expanded(text: str) -> str:
    """With the variables of the environment and `~` written out."""
    return os.path.expanduser(os.path.expandvars(text))
