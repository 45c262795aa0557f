"""containers/build.sh refuses before it begins what would fail later; that it builds is shown in tests/cluster."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.conftest import Put


def build(*arguments: str, where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "containers" / "build.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=where, env={**os.environ, **variables})


@pytest.fixture
def apptainer(program: Put, tmp_path: Path) -> Path:
    """Stands in for Apptainer, with room to build in; notes what it was asked. Returns where."""
    asked = tmp_path / "asked"
    program("apptainer", f'printf "%s\\n" "$@" > {asked}; touch "${{@: -2:1}}"')
    program("df", "printf 'Avail\\n 99\\n'")
    return asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--torch"], "--torch needs a value"),
        (["--output"], "--output needs a value"),
        (["--base", ""], "--base needs a value"),
        (["--output", "/nowhere/a/b.sif"], "mend:  name a file in a folder that exists"),
        (["--output", "/tmp"], "mend:  name the file, /tmp/cmrhpc.sif"),
        (["--torch", "1.0"], "lock.py --torch 1.0"),
        (["--nonsense"], "unknown option --nonsense"),
    ],
)
def test_refused_with_its_mend(tmp_path: Path, apptainer: Path, arguments: list[str], words: str) -> None:
    done = build(*arguments, where=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert not apptainer.exists()


def test_folder_to_build_in_that_is_not_there(tmp_path: Path, apptainer: Path) -> None:
    done = build(where=tmp_path, APPTAINER_TMPDIR="/nowhere/tmp")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1] == "  where: /nowhere/tmp"
    assert "set APPTAINER_TMPDIR" in done.stderr
    assert not apptainer.exists()


def test_less_than_twelve_gigabytes_are_too_few(tmp_path: Path, apptainer: Path, program: Put) -> None:
    program("df", "printf 'Avail\\n 11\\n'")
    assert "11 GB free" in build(where=tmp_path).stderr
    assert not apptainer.exists()


def test_machine_without_apptainer(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "readlink", "sed"):
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    done = build(where=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "module load apptainer" in done.stderr


def test_base_on_disk_is_named_from_where_the_caller_stands(tmp_path: Path, apptainer: Path) -> None:
    (tmp_path / "debian").mkdir()
    local = ["--build-arg", "bootstrap=localimage", "--build-arg", "base=debian"]
    done = build("--output", "here.sif", "--", *local, where=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = apptainer.read_text().splitlines()
    assert asked[-6:] == [*local[:3], f"base={tmp_path}/debian", f"{tmp_path}/here.sif.part", "containers/cmrhpc.def"]
    assert (tmp_path / "here.sif.sha256").read_text().endswith("  here.sif\n")


def test_only_where_pip_finds_packages_is_passed_on(tmp_path: Path, apptainer: Path, program: Put) -> None:
    settings = ["global.index-url='https://in.example/simple'", "install.user='true'", ":env:.require-virtualenv='1'"]
    program("python3", f"[ $3 != config ] || printf '%s\\n' {' '.join(map(shlex.quote, settings))}")
    program("apptainer", f'env > {apptainer}; touch "${{@: -2:1}}"')
    assert build("--output", "here.sif", where=tmp_path).returncode == 0
    passed = [line for line in apptainer.read_text().splitlines() if line.startswith("PIP_")]
    assert "PIP_INDEX_URL=https://in.example/simple" in passed
    assert not [line for line in passed if line.startswith(("PIP_USER", "PIP_REQUIRE"))]
    taken = re.search(r"grep -iE '(.*?)'", (ROOT / "containers/cmrhpc.def").read_text())
    assert taken
    for name, right in (("PIP_INDEX_URL", True), ("PIP_USER", False), ("HTTPS_PROXY", True), ("PIP_CERT", True)):
        assert bool(re.match(taken[1], f"export {name}=x", re.IGNORECASE)) is right


def test_a_new_image_never_lies_beside_the_checksum_of_the_old_one(
    tmp_path: Path, apptainer: Path, program: Put
) -> None:
    image, checksum = tmp_path / "here.sif", tmp_path / "here.sif.sha256"
    image.write_text("old")
    checksum.write_text("old")
    program("mv", f'[ -e {checksum} ] && cp {checksum} {tmp_path}/beside; exec /bin/mv "$@"')
    assert build("--output", "here.sif", where=tmp_path).returncode == 0
    assert not (tmp_path / "beside").exists()
    done = subprocess.run(["sha256sum", "--check", checksum.name], cwd=tmp_path, capture_output=True)
    assert (done.returncode, image.read_text()) == (0, "")


def test_a_base_with_a_digest_is_pinned_to_the_new_one(tmp_path: Path, apptainer: Path, program: Put) -> None:
    copy = tmp_path / "containers"
    shutil.copytree(ROOT / "containers", copy)
    program("skopeo", "echo sha256:new")
    for base in ("debian:12", "debian@sha256:old", "registry:5000/debian:12@sha256:old", "registry:5000/debian"):
        line = ["bash", str(copy / "build.sh"), "--base", base, "--pin"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout == base.split("@")[0].removesuffix(":12") + "@sha256:new\n"
