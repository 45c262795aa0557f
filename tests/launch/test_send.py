"""What is submitted, word for word: a change of it shows in review as a change of the files in golden/.

After a change that is meant, CMRHPC_GOLDEN=write makes them anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmrhpc.errors import BadInput
from cmrhpc.launch.arrays import Array, Ask
from cmrhpc.launch.executors import over
from cmrhpc.launch.send import dependency, own_parameters, parameters, script, settings
from cmrhpc.profile import Profile, parse_profile
from cmrhpc.workspace import Workspace

GOLDEN = Path(__file__).with_name("golden")
FULL = """
[slurm]
partition = "gpu"
account = "heart"
qos = "long"
constraint = "a100"
signal_seconds = 300
options = ["--exclude=n7,n8", "--mail-type=FAIL", "--exclusive"]
[environment]
lines = ["module load apptainer", "export APPTAINER_CACHEDIR=/scratch/$USER"]
[stages.synthesize]
time = "1-12:00:00"
cpus = 4
memory = "24G"
gres = "gpu:a100:1"
"""
ARRAYS = {
    "ingest": ("", Array("ingest", "ingest", ((0,),), Ask(7200, 4, 8192, ""))),
    "synthesize": (
        FULL,
        Array("synthesize-r0f1", "synthesize", ((2,), (3,)), Ask(129600, 4, 24576, "gpu:a100:1"), (), ("11",)),
    ),
    "classify": (
        "[stages.classify]\ntasks_per_gpu = 2\n",
        Array("classify-r0f1", "classify", ((5, 6), (7,)), Ask(21600, 4, 32768, "gpu:1"), ("12", "13"), ("11",)),
    ),
    "aggregate": ("", Array("aggregate", "aggregate", ((0,),), Ask(3600, 2, 8192, ""), ("14", "15"))),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_sbatch_file(workspace: Workspace, name: str) -> None:
    profile, array = ARRAYS[name]
    text = script(workspace, array, parse_profile(profile), "0a1b2c3d", dependency(array, {}))
    text = text.replace(str(workspace.root), "/data/ws").replace(sys.executable, "/venv/bin/python")
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("CMRHPC_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_words_of_a_path_stay_one_word(tmp_path: Path, study_text: str) -> None:
    place = tmp_path / "it's a study"
    place.mkdir()
    (place / "study.toml").write_text(study_text)
    text = script(Workspace(place), ARRAYS["ingest"][1], parse_profile(""), "0a1b2c3d", None)
    words = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\n' \"$@\"; }}\n{text}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folder = f"{place}/submissions/submitit/ingest-0a1b2c3d"
    assert words[-1] == folder
    assert f"{folder}/%j_%t_log.out" in words


def with_image(tmp_path: Path, more: str = "") -> Profile:
    return parse_profile(f'[container]\nimage = "{tmp_path}/cmrhpc.sif"\n{more}')


def test_the_container_of_a_profile(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such image"):
        settings(workspace, with_image(tmp_path), "classify")
    (tmp_path / "cmrhpc.sif").write_text("an image")
    with pytest.raises(BadInput, match="sha256sum"):
        settings(workspace, with_image(tmp_path), "classify")
    (tmp_path / "cmrhpc.sif.sha256").write_text("0" * 64)
    plain = {"CMRHPC_CONTAINER": f"{tmp_path}/cmrhpc.sif", "CMRHPC_CONTAINER_OPTIONS": ""}
    assert settings(workspace, with_image(tmp_path), "classify") == plain
    profile = with_image(tmp_path, 'binds = ["/scratch", "/a:/b"]\noptions = ["--nv", "--writable-tmpfs"]')
    found = settings(workspace, profile, "classify")
    assert found["APPTAINER_BIND"] == "/scratch,/a:/b"
    assert found["CMRHPC_CONTAINER_OPTIONS"] == "--nv --writable-tmpfs"


def test_ingest_sees_raw_images_that_lie_elsewhere(tmp_path: Path, study_text: str) -> None:
    for name in ("cmrhpc.sif", "cmrhpc.sif.sha256"):
        (tmp_path / name).touch()
    for raw, binds in (("raw", None), ("../elsewhere", f"{tmp_path}/elsewhere")):
        place = tmp_path / "ws"
        place.mkdir(exist_ok=True)
        (place / "study.toml").write_text(study_text.replace('raw = "raw"', f'raw = "{raw}"'))
        assert settings(Workspace(place), with_image(tmp_path), "ingest").get("APPTAINER_BIND") == binds
        assert "APPTAINER_BIND" not in settings(Workspace(place), with_image(tmp_path), "classify")


def test_synthesize_sees_external_images_that_lie_elsewhere(tmp_path: Path, study_text: str) -> None:
    for name in ("cmrhpc.sif", "cmrhpc.sif.sha256"):
        (tmp_path / name).touch()
    (tmp_path / "ws").mkdir()
    more = "".join(
        f'[generators.{name}]\nexternal = "{folder}"\n' for name, folder in (("a", "made"), ("b", "../made"))
    )
    (tmp_path / "ws" / "study.toml").write_text(study_text + more)
    workspace = Workspace(tmp_path / "ws")
    assert settings(workspace, with_image(tmp_path), "synthesize")["APPTAINER_BIND"] == f"{tmp_path}/made"
    assert "APPTAINER_BIND" not in settings(workspace, with_image(tmp_path), "classify")


def test_a_profile_takes_nothing_from_the_users_own_executor(workspace: Workspace) -> None:
    own = {"partition": "mine", "setup": ["module load x"], "additional_parameters": {"exclusive": True}, "time": 5}
    asked = parameters(workspace, ARRAYS["classify"][1], parse_profile(""), "0a1b2c3d", "afterany:12")
    made = over(own, asked)
    assert (made["partition"], made["time"], made["dependency"]) == ("mine", 360, "afterany:12")
    assert made["setup"] == ["module load x", "umask 007"]
    assert made["additional_parameters"] == {"exclusive": True, "requeue": True, "kill-on-invalid-dep": "yes"}
    first = own_parameters(workspace, ARRAYS["ingest"][1], "0a1b2c3d", None)
    assert over(made, first)["dependency"] is None
