"""What is sent, in which order, and what becomes of a job that is refused or of which sbatch does not tell.

Programs stand in for Slurm's: a controller whose answer is lost cannot be had from a real one at will.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cmrhpc
from cmrhpc.cli import main
from cmrhpc.errors import BadInput, CmrhpcError, Incomplete
from cmrhpc.launch import submit
from cmrhpc.launch.slurm import Limits
from cmrhpc.profile import parse_profile
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put
from tests.launch.proposed import PROFILE, propose
from tests.outputs import name_of_ended_process, write_all

POLICY = (
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
OTHER = "echo '3|PENDING|Priority||somebody|(null)'"


@pytest.mark.parametrize(
    ("said", "queue", "kind", "words"),
    [
        # Slurm 24.11 names the limit, as here; older ones do not, and the queue tells how likely it is.
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}", OTHER, BadInput, "QOSMaxWallDuration"),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}", "true", Incomplete, "the same command goes on"),
        (POLICY, "true", BadInput, "mend the profile"),
        (POLICY, OTHER, Incomplete, "or the profile asks for more than the account or QOS allows"),
        ("Slurm temporarily unable to accept job, sleeping and retrying", "true", Incomplete, "goes on"),
        ("Invalid partition name specified", OTHER, BadInput, "mend the profile"),
    ],
)
def test_a_job_that_is_too_large_is_not_taken_for_one_too_many(
    ready: Workspace, program: Put, tmp_path: Path, said: str, queue: str, kind: type[CmrhpcError], words: str
) -> None:
    from submitit import AutoExecutor

    program("srun", "exit 0")
    program("squeue", queue)
    program("sbatch", f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
    with pytest.raises(CmrhpcError) as raised:
        cmrhpc.submit(ready, AutoExecutor(tmp_path / "logs", cluster="slurm"))
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert "sent:  0 of 19 tasks" in str(raised.value)
    assert not [*(ready.root / "submissions").rglob("asked/*")]


@pytest.mark.parametrize(
    "said",
    [
        "echo sbatch: error: Batch job submission failed: Socket timed out on send/recv operation >&2; exit 1",
        "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller' >&2; exit 1",
        "echo taken; exit 0",
        "kill -KILL $$",
        "printf '\\377\\n' >&2; exit 0",  # submitit cannot read it, and kills sbatch
    ],
)
def test_a_job_of_which_sbatch_does_not_tell_is_looked_for_and_not_sent_twice(
    ready: Workspace, program: Put, tmp_path: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one is queued, and Slurm's answer is lost."""
    ready.root.chmod(0o2770)
    queue, count = tmp_path / "queue", tmp_path / "count"
    program("srun", "exit 0")
    program("sacct", "exit 1")
    program(
        "squeue",
        f'[ ! -e {queue} ] || if [[ $* = *--name=* ]]; then echo "9|$(cat {queue})"; else\n'
        f'for k in 0 1; do echo "9_$k|RUNNING|None|n1|$(cat {queue})|c"; done; fi',
    )
    name = "sed -n 's/^#SBATCH --job-name=//p' $1"
    program(
        "sbatch", f"echo x >> {count}; [ -e {queue} ] || {{ {name} > {queue}; {said}; }}\necho job 1$(wc -l < {count})"
    )
    (tmp_path / "mine.toml").write_text('[environment]\nlines = ["true"]\n')
    command = ["submit", str(ready.root), "--profile", str(tmp_path / "mine.toml"), "--yes"]
    assert main(command) == 4
    assert "whether it took the job" in capsys.readouterr().err
    (note,) = (ready.root / "submissions" / "asked").iterdir()
    planned = propose(ready).arrays
    assert not note.exists()
    place = ready.root / "submissions" / "submitit" / note.stem
    for path in (place, *place.iterdir()):  # a job unpickles what lies there as whoever submits
        assert not path.stat().st_mode & 0o027, path
    (first,) = (ready.root / "submissions").glob("*.json")
    told = json.loads(first.read_text())
    assert (told["job"], told["name"]) == ("9", note.stem)
    assert (ready.root / "submissions" / "submitit" / note.stem).is_dir()
    assert main(command) == 0
    sent = [json.loads(path.read_text()) for path in (ready.root / "submissions").glob("*.json")]
    assert len(sent) == len(planned) + 1 == len(count.read_text().split())
    assert [one["job"] for one in sent if one["name"] == note.stem] == ["9"]


def test_an_image_of_another_version_is_told_before_it_is_sent(
    ready: Workspace, program: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.sif", "x.sif.sha256"):
        (tmp_path / name).write_text("0" * 64)
    (tmp_path / "mine.toml").write_text('[container]\nimage = "x.sif"\n')
    for name in ("squeue", "srun"):
        program(name, "exit 0")
    program("sbatch", "echo job $$")
    program("apptainer", f"echo x >> {tmp_path}/started; echo cmrhpc 0.0.9")
    assert main(["submit", str(ready.root), "--profile", str(tmp_path / "mine.toml"), "--yes", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.endswith(f"holds cmrhpc 0.0.9, and this is cmrhpc {cmrhpc.__version__}: tasks run the image's code")
    assert (tmp_path / "started").read_text() == "x\n"


def test_an_array_that_is_refused_holds_up_no_other(ready: Workspace, program: Put) -> None:
    """Only what asks for the same is not tried, and what would read its shards; all others go, and the report."""
    program("squeue", "exit 0")
    sent, n = [], iter(range(50, 99))

    class Job:
        def __init__(self) -> None:
            self.job_id = f"{next(n)}_0"

    def send(array, jobs):  # type: ignore[no-untyped-def]
        if array.stage == "refine":
            raise BadInput("Slurm refuses the job", array.name, "mend the profile")
        assert not [name for name in array.after if name.startswith("refine")]
        sent.append(array.name)
        return [Job()]

    with pytest.raises(BadInput, match="Slurm refuses the job") as raised:
        submit.submit_all(ready, parse_profile(PROFILE), Limits(), send)
    planned = [a for a in propose(ready).arrays if a.stage != "refine"]
    waiting = [a.name for a in planned if a.stage == "classify" and any(name.startswith("refine") for name in a.after)]
    assert len(waiting) == 2
    planned = [a for a in planned if a.name not in waiting]
    assert sent == [a.name for a in planned]
    assert sent[-1] == "aggregate"
    assert f"{sum(len(a.tasks) for a in planned)} of 19 tasks" in str(raised.value)


def test_a_report_that_alone_is_missing_is_sent(workspace: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    write_all(workspace)
    sent = []

    class Job:
        job_id = "50"

    def send(array, jobs):  # type: ignore[no-untyped-def]
        sent.append(array.name)
        return [Job()]

    stale = name_of_ended_process(workspace.root / "a.h5")
    stale.touch()
    assert len(submit.submit_all(workspace, parse_profile(PROFILE), Limits(), send)) == 1
    assert not stale.exists()  # of a process that is gone
    assert sent == ["aggregate"]
    assert (workspace.root / "logs").is_dir()  # before the first job makes it with the group of its user


def test_where_all_is_refused_no_report_is_sent(ready: Workspace, program: Put) -> None:
    program("squeue", "exit 0")

    def send(array, jobs):  # type: ignore[no-untyped-def]
        assert array.stage != "aggregate"
        raise BadInput("Slurm refuses the job", array.name, "mend the profile")

    with pytest.raises(BadInput, match="sent:  0 of 19 tasks"):
        submit.submit_all(ready, parse_profile(PROFILE), Limits(), send)


def test_a_finished_study_has_nothing_to_submit_but_its_report(workspace: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    write_all(workspace)
    assert [a.name for a in propose(workspace).arrays] == ["aggregate"]


@pytest.mark.parametrize("answer", ["n\n", "\x04"])  # no, and the end of input
def test_a_person_is_asked_and_may_refuse(ready: Workspace, program: Put, tmp_path: Path, answer: str) -> None:
    for name in ("squeue", "srun"):
        program(name, "exit 0")
    program("sbatch", f"touch {tmp_path}/sent")
    profile = tmp_path / "mine.toml"
    profile.write_text('[environment]\nlines = ["true"]\n')
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "cmrhpc.cli", "submit", str(ready.root), "--profile", str(profile)]
    asking = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, answer.encode())
    out, err = asking.communicate(timeout=120)
    assert asking.returncode == 0
    assert "GPU-hours" in out
    assert "send 19 tasks? [y/N]" in err
    assert "nothing was sent" in err
    assert not (tmp_path / "sent").exists()
