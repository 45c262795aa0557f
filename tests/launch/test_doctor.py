"""What doctor finds: what is well, what is not, and its mend. The real cluster's part is in tests/cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from cmrhpc import __version__, doctor, shards
from cmrhpc.cli import main
from cmrhpc.doctor import has_code_for
from cmrhpc.findings import Finding
from cmrhpc.launch import cluster
from cmrhpc.profile import load_profile
from tests.conftest import ROOT
from tests.launch.conftest import Put


def found(findings: list[Finding], words: str) -> Finding:
    """The one finding that has these words."""
    (one,) = [finding for finding in findings if words in finding["what"]]
    return one


def test_machine_without_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert all(set(finding) == {"what", "ok", "mend", "needed"} for finding in findings)
    assert all(bool(finding["mend"]) is not finding["ok"] for finding in findings)
    assert not found(findings, "Slurm is not here")["ok"]
    assert not found(findings, "Apptainer is not here")["ok"]
    assert found(findings, "is writable and renames in one step")["ok"]
    assert found(findings, "exclusive file creation works")["ok"]
    assert found(findings, "a shard can be written and read here")["ok"]
    assert found(findings, "the file system's clock agrees")["ok"]
    assert os.listdir(tmp_path) == []


def test_what_is_needed_and_wrong_is_told_to_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 3 for what was named and cannot serve; the same finding about what nobody named is a note."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CMRHPC_CONTAINER", raising=False)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "note Slurm is not here" in said
    assert "MEND" not in said
    assert main(["doctor", "--profile", "template"]) == 3
    assert "MEND Slurm is not here" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "nowhere")]) == 3
    said, complaint = capsys.readouterr()
    assert f"MEND {tmp_path}/nowhere: No such file or directory" in said
    assert complaint.startswith("cmrhpc: 1 finding to mend")
    image = tmp_path / "cmrhpc.sif"
    image.write_text("no checksum beside it")
    monkeypatch.setenv("CMRHPC_CONTAINER", str(image))
    assert main(["doctor", "--json"]) == 3
    told = capsys.readouterr()
    assert not found(json.loads(told.out)["findings"], "no checksum beside it")["ok"]
    assert told.err == ""


def test_every_package_that_is_asked_for_is_looked_at() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = [finding["what"].split(" ")[0] for finding in doctor.findings()]
    for words in (*asked["dependencies"], *asked["optional-dependencies"]["train"]):
        assert re.split("[<>=]", words)[0] in said


def test_what_pip_could_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "cmrhpc", tmp_path / "cmrhpc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = found(doctor.findings(), "convolutions for CPUs cannot be used: there was no C compiler")
    assert (told["ok"], told["needed"]) == (False, False)
    assert "install a C compiler" in told["mend"]
    (tmp_path / "cmrhpc" / "nets" / "_convolution.abi3.so").write_text("of another system")
    assert not found(doctor.findings(), "_convolution.abi3.so")["ok"]


# The lists of torch 2.15 for CUDA 13 and of torch 2.6 for CUDA 12.4.
NEW, OLD = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80"]


@pytest.mark.parametrize(
    ("capability", "built", "serves"),
    [
        ((7, 0), NEW, False),  # V100
        ((6, 0), NEW, False),  # P100
        ((7, 0), OLD, True),
        ((6, 1), OLD, True),  # sm_60 serves the later minor
        ((7, 5), NEW, True),
        ((8, 9), NEW, True),
        ((3, 7), OLD, False),  # K80
        ((9, 0), OLD, False),
        ((9, 0), [*OLD, "compute_80"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 0), ["sm_100a"], True),
        ((7, 0), ["compute_75"], False),
    ],
)
def test_gpus_that_a_torch_build_has_code_for(capability: tuple[int, int], built: list[str], serves: bool) -> None:
    assert has_code_for(capability, built) is serves


def test_gpu_that_torch_sees_and_has_no_code_for(program: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such GPU is at hand: the answers of the driver and of torch stand in."""
    import torch

    program("nvidia-smi", "echo 'Tesla V100-SXM2-32GB, 32768 MiB, 580.65.06'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: NEW)
    wrong = found(doctor.findings(), "GPU Tesla V100")
    assert "has no code for compute capability 7.0, only sm_75" in wrong["what"]
    assert "torch==2.6.*" in wrong["mend"]
    assert wrong["needed"]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: OLD)
    assert found(doctor.findings(), "GPU Tesla V100")["ok"]


def test_controller_that_does_not_answer(program: Put) -> None:
    program("sinfo", "[ $1 = --version ] && echo slurm 23.02.7")
    program("scontrol", "exit 1")
    version, silent = cluster.slurm_findings(None)
    assert (version["what"], version["ok"], version["mend"]) == ("Slurm 23.02.7", True, "")
    assert silent["what"] == "Slurm's controller does not answer within 10 s"


def test_partitions_accounting_and_clock(program: Put) -> None:
    program("sinfo", "[ $1 = --version ] && echo slurm 23.02.7 || echo 'long*|down|7-00:00:00|3|(null)'")
    program("scontrol", "echo Configuration data as of 1000; echo 'AccountingStorageType = accounting_storage/none'")
    program("sacctmgr", "exit 1")
    findings = cluster.slurm_findings(None)
    assert found(findings, "accounting is off")["ok"]
    assert "behind this machine's" in found(findings, "the controller's clock")["what"]
    assert not found(findings, "partition long (default): 3 nodes, no GPUs, at most 7-00:00:00, is down")["ok"]
    assert "leave gres empty" in found(findings, "no partition has GPUs")["mend"]
    assert found(findings, "arrays of ? tasks at most, no submit limit found")["ok"]


def test_profile_that_asks_for_what_is_not_there(program: Put, tmp_path: Path) -> None:
    program("sinfo", "[ $1 = --version ] && echo slurm 23.02.7 || echo 'short*|up|4:00:00|3|gpu:a100:4'")
    program("scontrol", "echo Configuration data as of 1000")
    path = tmp_path / "here.toml"
    path.write_text('[stages.refine]\ngres = "gpu:v100:1"\ntime = "04:00:00"\n[stages.classify]\ntime = "20:00"\n')
    wrong = [finding["what"] for finding in cluster.slurm_findings(load_profile(path)) if "profile" in finding["what"]]
    assert wrong == [
        "profile here: synthesize asks for 12:00:00, partition short gives 4:00:00",
        "profile here: refine asks for GPU type v100, partition short has a100",
    ]
    path.write_text('[slurm]\npartition = "long"')
    assert found(cluster.slurm_findings(load_profile(path)), "there is no partition long")["mend"].startswith(
        "name one"
    )


def test_each_stage_is_held_against_its_own_partitions(program: Put, tmp_path: Path) -> None:
    kinds = "echo 'gpu*|up|8:00:00|3|gpu:a100:4'; echo 'cpu|up|1:00:00|9|(null)'; echo 'long|up|infinite|9|(null)'"
    program("sinfo", f"[ $1 = --version ] && echo slurm 23.02.7 || {{ {kinds}; }}")
    program("scontrol", "echo Configuration data as of 1000")
    path = tmp_path / "here.toml"
    path.write_text(
        '[stages.ingest]\npartition = "cpu"\n[stages.synthesize]\npartition = "gpu,long"\n'
        '[stages.refine]\npartition = "cpu,long"\n[stages.classify]\ngpus = "v100:1"\n'
        '[stages.aggregate]\npartition = "elsewhere"\n'
    )
    wrong = [finding["what"] for finding in cluster.slurm_findings(load_profile(path)) if "profile" in finding["what"]]
    assert wrong == [
        "profile here: there is no partition elsewhere",
        "profile here: ingest asks for 02:00:00, partition cpu gives 1:00:00",
        "profile here: refine asks for a GPU, partition cpu,long has none",
        "profile here: classify asks for GPU type v100, partition gpu has a100",
    ]


def test_folders_to_bind_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path / "mine.toml"
    path.write_text('[container]\nimage = "x.sif"\nbinds = ["here:/x", "nowhere:/y:ro"]\n')
    (finding,) = [f for f in cluster.container_findings(load_profile(path)) if "binds" in f["what"]]
    assert finding["what"] == f"profile mine: {tmp_path}/nowhere of binds is not here"
    assert "no container starts" in finding["mend"]


def test_what_the_profile_needs_of_the_partitions(program: Put, tmp_path: Path) -> None:
    """Down is only needed where a stage has no other; no GPUs only where some stage asks for one."""
    program("sinfo", "[ $1 = --version ] && echo slurm 23.02.7 || printf 'a*|up|1-0|3|(null)\\nb|down|1-0|3|(null)\\n'")
    program("scontrol", "echo Configuration data as of 1000")
    path = tmp_path / "here.toml"
    for stages, down, gpus in (('partition = "b"', True, True), ('partition = "a,b"', False, True), ("", False, True)):
        path.write_text(f"[slurm]\n{stages}\n")
        findings = cluster.slurm_findings(load_profile(path))
        assert found(findings, "partition b: 3 nodes, no GPUs, at most 1-0, is down")["needed"] is down
        assert found(findings, "no partition has GPUs")["needed"] is gpus
    path.write_text("".join(f'[stages.{stage}]\ngres = ""\n' for stage in ("synthesize", "refine", "classify")))
    assert not found(cluster.slurm_findings(load_profile(path)), "no partition has GPUs")["needed"]
    assert not any(finding["needed"] for finding in cluster.slurm_findings(None) if not finding["ok"])


def test_image_and_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "cmrhpc.sif"
    monkeypatch.setenv("CMRHPC_CONTAINER", str(image))
    assert not found(cluster.container_findings(None), "no image")["ok"]
    image.write_text("one")
    assert "no checksum beside it" in found(cluster.container_findings(None), str(image))["what"]
    checksum = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # of "one"
    (tmp_path / "cmrhpc.sif.sha256").write_text(f"{checksum}  cmrhpc.sif\n")
    assert found(cluster.container_findings(None), "its checksum holds")["ok"]
    (tmp_path / "cmrhpc.sif.sha256").write_bytes(b"\xff\xfe7692")
    assert "it is no text" in found(cluster.container_findings(None), f"{image}.sha256 cannot be read")["what"]
    (tmp_path / "cmrhpc.sif.sha256").write_text(f"{checksum}  cmrhpc.sif\n")
    image.write_text("two")
    assert "copy it again" in found(cluster.container_findings(None), "its checksum does not hold")["mend"]
    image.unlink()
    image.mkdir()
    assert found(cluster.container_findings(None), f"an unpacked folder, which carries the checksum {checksum[:12]}")[
        "ok"
    ]


def test_image_without_user_namespaces(program: Put, tmp_path: Path) -> None:
    program("apptainer", "echo apptainer version 1.4.5")
    program("unshare", "exit 1")
    assert not found(cluster.container_findings(None), "no user namespaces, and Apptainer is not setuid")["ok"]
    program("apptainer", f"[ $1 = buildcfg ] && echo LIBEXECDIR={tmp_path}/lib || echo apptainer version 1.4.5")
    starter = tmp_path / "lib/apptainer/bin/starter-suid"
    starter.parent.mkdir(parents=True)
    starter.write_text("")
    starter.chmod(0o4755)
    setuid = os.geteuid() == 0  # only root's file would be
    words = "but Apptainer is setuid" if setuid else "and Apptainer is not setuid"
    assert found(cluster.container_findings(None), words)["ok"] is setuid


def test_image_of_another_version(program: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "cmrhpc.sif"
    image.touch()
    monkeypatch.setenv("CMRHPC_CONTAINER", str(image))
    monkeypatch.setenv("CMRHPC_CONTAINER_OPTIONS", "--bind /code")
    for said, differs in ((f"echo cmrhpc {__version__}", False), ("echo cmrhpc 0.0.9", True), ("exit 255", False)):
        program("apptainer", f"[[ $* != '--quiet exec --bind /code {image} cmrhpc --version' ]] || {{ {said}; }}")
        words = f"holds cmrhpc 0.0.9, and this is cmrhpc {__version__}"
        told = [finding for finding in cluster.container_findings(None) if words in finding["what"]]
        assert [finding["needed"] for finding in told] == ([False] if differs else [])


def test_disks_that_are_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Put) -> None:
    program("apptainer", "echo apptainer version 1.4.5")
    for name in ("TMPDIR", "APPTAINER_TMPDIR", "APPTAINER_CACHEDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(cluster, "TEMPORARY_GIB", 1e6)
    monkeypatch.setattr(cluster, "BUILD_GIB", 0)
    one, two, three = cluster.disk_findings()
    assert not one["ok"]
    assert "set TMPDIR to a folder with" in one["mend"]
    assert two["ok"]
    assert three["what"].startswith(f"APPTAINER_CACHEDIR {tmp_path}: ")


def test_folders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Put) -> None:
    """Only the cache is a folder that Apptainer makes itself."""
    program("apptainer", "echo apptainer version 1.4.5")
    away = tmp_path / "not" / "there"
    for name in ("TMPDIR", "APPTAINER_TMPDIR", "APPTAINER_CACHEDIR"):
        monkeypatch.setenv(name, str(away))
    monkeypatch.setattr(cluster, "CACHE_GIB", 0)
    one, two, three = cluster.disk_findings()
    assert [one["what"], two["what"]] == [f"TMPDIR {away} does not exist", f"APPTAINER_TMPDIR {away} does not exist"]
    assert not one["ok"]
    assert "set TMPDIR to a folder with 0.1 GiB" in one["mend"]
    assert three["ok"]
    (tmp_path / "not").write_text("a file in the way")
    assert cluster.disk_findings()[2]["what"] == f"APPTAINER_CACHEDIR {away} is not a folder"


def test_file_system_on_which_hdf5_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(shards, "_write_datasets", refuse)
    wrong = found(cluster.folder_findings(tmp_path), "no shard can be written: cannot write: Operation not supported")
    assert (wrong["ok"], wrong["needed"]) == (False, True)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    (finding,) = cluster.folder_findings(tmp_path / "nowhere")
    assert finding["what"].endswith("nowhere: No such file or directory")


def test_profile_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--profile", "nowhere.toml"]) == 3
    assert "nowhere.toml" in capsys.readouterr().err
