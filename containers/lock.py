#!/usr/bin/env python3
"""Write the locked requirements of the image: exact versions with the sha256 of each file.

    python3 containers/lock.py                  # requirements.txt and requirements-torch2.15.txt
    python3 containers/lock.py --torch 2.6      # requirements-torch2.6.txt, beside the same requirements.txt

Run it with the Python that the image has and on its processor type: wheels differ by both. pip resolves against the
index that it is configured for; the files name none. What pyproject.toml asks for without `train` goes to
requirements.txt (also what a login node needs), what `train` adds goes to the file named after its torch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def resolve(requirements: list[str], constraints: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> (version, sha256) of everything that pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        bounds = Path(folder) / "constraints.txt"
        bounds.write_text("".join(f"{name}=={version}\n" for name, version in constraints.items()))
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        options = ["--only-binary", ":all:", "--report", str(report), "--constraint", str(bounds)]
        subprocess.run([*pip, *options, *requirements], check=True)
        chosen = json.loads(report.read_text())["install"]
    return {
        re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): (
            item["metadata"]["version"],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in chosen
    }


def text(found: dict[str, tuple[str, str]], title: str) -> str:
    """A requirements file for `pip install --require-hashes`."""
    python = f"CPython {sys.version_info.major}.{sys.version_info.minor}"
    head = f"# {title} Written by containers/lock.py for {python}; do not edit.\n"
    return head + "".join(f"{n}=={v} --hash=sha256:{h}\n" for n, (v, h) in sorted(found.items()))


def read(path: Path) -> dict[str, str]:
    """Name -> version of a file that `text` wrote."""
    return dict(re.findall(r"^(\S+)==(\S+) ", path.read_text(), flags=re.MULTILINE))


def main() -> None:
    """Resolve and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", metavar="X.Y", help="lock this torch, not the newest, and leave the rest as it is")
    asked = parser.parse_args()

    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    plain = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    train = project["project"]["optional-dependencies"]["train"]
    base_file = HERE / "requirements.txt"

    # What every installation needs.
    if not asked.torch:
        base_file.write_text(text(resolve(plain, {}), "cmrhpc without torch."))
    base = read(base_file)

    # What training adds to it.
    pin = [f"torch=={asked.torch}.*"] if asked.torch else []
    added = {name: found for name, found in resolve([*plain, *train, *pin], base).items() if name not in base}
    version = ".".join(added["torch"][0].split(".")[:2])
    (HERE / f"requirements-torch{version}.txt").write_text(text(added, f"Added by cmrhpc[train], torch {version}."))


if __name__ == "__main__":
    main()
