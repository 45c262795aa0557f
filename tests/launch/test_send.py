"""What is submitted, word for word: a change of it shows in review as a change of the files in golden/.

After a change that is meant, CMRHPC_GOLDEN=write makes them anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cmrhpc.cli import main
from cmrhpc.errors import BadInput
from cmrhpc.launch import send
from cmrhpc.launch.arrays import Array, Request
from cmrhpc.launch.cluster import path_findings
from cmrhpc.launch.executors import asked_gpus, merged_parameters
from cmrhpc.launch.send import dependency, own_parameters, parameters, script, settings
from cmrhpc.profile import Profile, parse_profile
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put

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
    "ingest": ("", Array("ingest", "ingest", ((0,),), Request(7200, 4, 8192, ""))),
    "synthesize": (
        FULL,
        Array("synthesize-r0f1", "synthesize", ((2,), (3,)), Request(129600, 4, 24576, "gpu:a100:1"), (), ("11",)),
    ),
    "classify": (
        "[stages.classify]\ntasks_per_gpu = 2\n",
        Array("classify-r0f1", "classify", ((5, 6), (7,)), Request(21600, 4, 32768, "gpu:1"), ("12", "13"), ("11",)),
    ),
    "refine": (
        '[slurm]\npartition = "cpu"\naccount = "heart"\n[stages.refine]\npartition = "gpu,long"\ngpus = "a100:1"\n',
        Array("refine-r0f1", "refine", ((2,), (3,)), Request(21600, 2, 8192, "", "a100:1"), ("12",), ("11",)),
    ),
    "aggregate": ("", Array("aggregate", "aggregate", ((0,),), Request(3600, 2, 8192, ""), ("14", "15"))),
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


def test_a_dry_run_shows_the_image_and_the_tasks_too(
    workspace: Workspace, tmp_path: Path, program: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no part of the sbatch file, but of what is sent."""
    for name in ("cmrhpc.sif", "cmrhpc.sif.sha256"):
        (tmp_path / name).write_text("0" * 64)
    (tmp_path / "mine.toml").write_text(f'[container]\nimage = "{tmp_path}/cmrhpc.sif"\nbinds = ["/scratch"]\n')
    program("squeue", "exit 0")
    program("sbatch", "exit 0")
    assert main(["submit", str(workspace.root), "--profile", str(tmp_path / "mine.toml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    arrays = shown.count("#!/bin/bash")
    assert shown.count(f"##### CMRHPC_CONTAINER={tmp_path}/cmrhpc.sif\n") == arrays > 5
    assert shown.count("##### APPTAINER_BIND=/scratch") == arrays
    assert "##### tasks 0-1\n" in shown


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
    assert "APPTAINER_BIND" not in settings(workspace, with_image(tmp_path), "synthesize")  # a gone one stops no other
    (tmp_path / "made").mkdir()
    assert settings(workspace, with_image(tmp_path), "synthesize")["APPTAINER_BIND"] == f"{tmp_path}/made"
    assert "APPTAINER_BIND" not in settings(workspace, with_image(tmp_path), "classify")


def test_weights_and_the_raw_table_are_seen_where_they_lie_elsewhere(tmp_path: Path, study_text: str) -> None:
    for name in ("cmrhpc.sif", "cmrhpc.sif.sha256", "w.safetensors"):
        (tmp_path / name).touch()
    text = study_text.replace("[classifiers.resnet50]", '[classifiers.resnet50]\nweights = "../w.safetensors"')
    text = text.replace('raw = "raw"', 'raw = "../raw"') + '[generators.a]\nexternal = "made"\n'
    place = make(tmp_path / "ws", text)
    assert settings(place, with_image(tmp_path), "classify")["APPTAINER_BIND"] == f"{tmp_path}/w.safetensors"
    assert "APPTAINER_BIND" not in settings(place, with_image(tmp_path), "synthesize")  # it declares ids, as it seems
    (tmp_path / "raw").mkdir()
    assert settings(place, with_image(tmp_path), "synthesize")["APPTAINER_BIND"] == f"{tmp_path}/raw"
    (tmp_path / "w.safetensors").unlink()  # the tasks of this classifier tell, and others run
    assert "APPTAINER_BIND" not in settings(place, with_image(tmp_path), "classify")


def test_a_source_behind_a_link_is_bound_where_tasks_look_for_it_too(tmp_path: Path, study_text: str) -> None:
    for name in ("cmrhpc.sif", "cmrhpc.sif.sha256"):
        (tmp_path / name).touch()
    (tmp_path / "disk" / "raw").mkdir(parents=True)
    (tmp_path / "data").symlink_to("disk")
    for raw in ("../data/raw", f"{tmp_path}/data/raw", "linked"):
        place = make(tmp_path / raw.replace("/", "_"), study_text.replace('raw = "raw"', f'raw = "{raw}"'))
        (place.root / "linked").symlink_to(tmp_path / "disk" / "raw")
        real, seen = f"{tmp_path}/disk/raw", f",{tmp_path}/disk/raw:{tmp_path}/data/raw"
        binds = settings(place, with_image(tmp_path), "ingest")["APPTAINER_BIND"]
        assert binds == (real if raw == "linked" else real + seen)


def make(place: Path, study_text: str) -> Workspace:
    place.mkdir(parents=True)
    (place / "study.toml").write_text(study_text)
    return Workspace(place)


@pytest.mark.parametrize(("name", "words"), [("a\nb", "control"), ("p%j", "gives % in"), ("a\\b", "gives \\ in")])
def test_a_path_that_slurm_would_misread_is_refused(
    tmp_path: Path, study_text: str, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    place = make(tmp_path / name, study_text).root
    (tmp_path / "mine.toml").write_text('[environment]\nlines = ["true"]\n')
    assert main(["submit", str(place), "--profile", str(tmp_path / "mine.toml"), "--dry-run"]) == 3
    assert words in capsys.readouterr().err
    (finding,) = path_findings(place, None)
    assert words in finding["what"]
    assert not path_findings(make(tmp_path / "a b's", study_text).root, None)


def test_a_workspace_is_not_made_where_it_could_not_be_sent_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["phantom", str(tmp_path / "raw"), "--patients", "4"]) == 0
    init = ["init", str(tmp_path / "a\nb"), "--study", "demo", "--raw", str(tmp_path / "raw")]
    assert main(init) == 3
    assert "control characters" in capsys.readouterr().err
    assert not (tmp_path / "a\nb").exists()


@pytest.mark.parametrize(("place", "raw"), [(b"w\xff", "raw"), (b"ws", b"sub/r\xff")])
def test_a_folder_whose_name_is_no_text_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: bytes, raw: str | bytes
) -> None:
    images = tmp_path / os.fsdecode(raw)
    images.parent.mkdir(exist_ok=True)
    assert main(["phantom", str(images), "--patients", "4"]) == 0
    init = ["init", str(tmp_path / os.fsdecode(place)), "--study", "demo", "--raw", str(images)]
    assert main(init) == 3
    assert "not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workspace", "raw", "external", "stage"),
    [
        ("a:b", "raw", "made", "classify"),
        ("a,b", "raw", "made", "classify"),
        ("ws", "../r:aw", "made", "ingest"),
        ("ws", "raw", "../ma,de", "synthesize"),
    ],
)
def test_a_path_that_apptainer_would_cut_is_refused(
    tmp_path: Path, study_text: str, workspace: str, raw: str, external: str, stage: str
) -> None:
    for name in ("cmrhpc.sif", "cmrhpc.sif.sha256"):
        (tmp_path / name).touch()
    text = study_text.replace('raw = "raw"', f'raw = "{raw}"') + f'[generators.a]\nexternal = "{external}"\n'
    place = make(tmp_path / workspace, text)
    (place.root / external).mkdir()
    with pytest.raises(BadInput, match="Apptainer cannot bind a path with"):
        settings(place, with_image(tmp_path), stage)
    (finding,) = path_findings(place.root, with_image(tmp_path))
    assert "Apptainer cannot bind" in finding["what"]
    script(place, ARRAYS["ingest"][1], parse_profile(""), "0a1b2c3d", None)  # without an image nobody minds
    assert not path_findings(place.root, parse_profile(""))


def test_a_profile_alone_says_how_many_gpus(workspace: Workspace) -> None:
    own = {
        "gpus_per_node": 4,
        "mem_per_gpu": "9G",
        "exclude": "n7",
        "additional_parameters": {"gpus-per-task": 1, "x": 1},
    }
    for name, gpus in (("ingest", 0), ("synthesize", 1), ("refine", 1)):
        text, array = ARRAYS[name]
        made = merged_parameters(own, parameters(workspace, array, parse_profile(text), "0a1b2c3d", None))
        assert asked_gpus(made) == gpus
        assert not {"mem_per_gpu", "num_gpus", "gpus_per_task"} & set(made)
        assert (made["exclude"], made["additional_parameters"]["x"]) == ("n7", 1)
    assert asked_gpus(merged_parameters(own, own_parameters(workspace, array, "0a1b2c3d", None))) == 4


@pytest.mark.parametrize(
    ("own", "gpus"),
    [
        ({"time": 5, "gpus_per_node": None}, 0),
        ({"gpus_per_node": 1}, 1),
        ({"gpus_per_task": "a100:2"}, 2),
        ({"gres": "gpu:a100:2"}, 2),
        ({"additional_parameters": {"gpus-per-node": 3}}, 3),
    ],
)
def test_gpus_of_an_executor(own: dict[str, Any], gpus: int) -> None:
    assert asked_gpus(own) == gpus


def test_a_profile_takes_nothing_from_the_users_own_executor(workspace: Workspace) -> None:
    own = {"partition": "mine", "setup": ["module load x"], "additional_parameters": {"exclusive": True}, "time": 5}
    asked = parameters(workspace, ARRAYS["classify"][1], parse_profile(""), "0a1b2c3d", "afterany:12")
    made = merged_parameters(own, asked)
    assert (made["partition"], made["time"], made["dependency"]) == ("mine", 360, "afterany:12")
    assert made["setup"] == ["module load x", "umask 007"]
    assert made["additional_parameters"] == {"exclusive": True, "requeue": True, "kill-on-invalid-dep": "yes"}
    first = own_parameters(workspace, ARRAYS["ingest"][1], "0a1b2c3d", None)
    assert merged_parameters(made, first)["dependency"] is None


def test_a_variable_of_sbatch_wins_over_nothing_that_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PARTITION", "ACCOUNT", "GPUS_PER_NODE", "MEM_PER_CPU", "OUTPUT")
    for name in names:
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    for told, left in (
        ((), ["PARTITION", "ACCOUNT", "GPUS_PER_NODE", "MEM_PER_CPU"]),
        (("partition", "gres"), ["ACCOUNT", "MEM_PER_CPU"]),
        (("gpus-per-node", "mem"), ["PARTITION", "ACCOUNT"]),
    ):
        with send.undisturbed(told):
            assert [name for name in names if f"SBATCH_{name}" in os.environ] == left
    assert all(f"SBATCH_{name}" in os.environ for name in names)


def test_inside_a_job_the_same_slurm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CONF", "SLURM_CLUSTERS")
    for name in names:
        monkeypatch.setenv(name, "x")
    with send.undisturbed(()):
        assert [name for name in names if name in os.environ] == ["SLURM_CONF", "SLURM_CLUSTERS"]
