"""`cmrhpc submit` on a real cluster: what is sent, what waits for what, and what the study comes to."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.cluster import image, login
from tests.cluster.conftest import make_study
from tests.cluster.node import Node
from tests.cluster.study import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]
TASKS = {"ingest": 1, "synthesize": 4, "refine": 4, "classify": 10, "aggregate": 1}


def profile(container: bool = False, time: str = "00:20:00", lines: str = "", slurm: str = "", more: str = "") -> str:
    """A profile for a node that only claims to have many processors."""
    text = f"[slurm]\nsignal_seconds = 20\n{slurm}\n[environment]\nlines = [{lines}]\n"
    if container:
        text += f'[container]\nimage = "{image.SIF}"\nbinds = ["{image.TREE}/cmrhpc:/opt/cmrhpc/cmrhpc"]\n'
    for stage in TASKS:
        text += f'[stages.{stage}]\ntime = "{time}"\ncpus = 1\nmemory = "1G"\n'
        text += more if stage == "classify" else ""
    return text


def submit(node: Node, workspace: str, *options: str, check: bool = True) -> tuple[int, dict[str, Any], str]:
    """Exit code, what was said as JSON (where it was) and the complaint."""
    done = node.run(
        ["cmrhpc", "submit", workspace, "--profile", "profile.toml", "--json", *options], env=login.HERE, check=check
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def write_profile(node: Node, text: str) -> None:
    node.run(["tee", "profile.toml"], input=text)


def wait_for_all(node: Node, timeout: float = 1800) -> None:
    """Until the queue is empty."""
    end = time.monotonic() + timeout
    while node.run(["squeue", "--noheader", "--me"]).stdout.strip():
        assert time.monotonic() < end, node.run(["squeue"]).stdout
        time.sleep(0.5)


def submitted(node: Node, workspace: str) -> Counter[tuple[str, int]]:
    """How often each task was sent, by the records."""
    found: Counter[tuple[str, int]] = Counter()
    for path in (node.shared / workspace / "submissions").glob("*.json"):
        told = json.loads(path.read_text())
        found.update((told["stage"], index) for element in told["elements"] for index in element)
    return found


EVERY = Counter({(stage, index): 1 for stage, n in TASKS.items() for index in range(n)})


# ------------------------------------------------------------------------------------------------ with the container


@pytest.fixture(scope="module")
def study(login_node: Node) -> str:
    """A workspace that went through `cmrhpc submit` with the container, classifiers two to a GPU."""
    make_study(login_node, "whole")
    write_profile(login_node, profile(container=True, more="tasks_per_gpu = 2\n"))
    code, told, _ = submit(login_node, "whole", "--yes")
    assert code == 0
    assert {stage: row["tasks"] for stage, row in told["stages"].items()} == TASKS

    # At once again: everything is queued, nothing is sent.
    code, again, _ = submit(login_node, "whole", "--yes")
    assert (code, again["arrays"], again["queued"]) == (0, [], 20)
    wait_for_all(login_node)
    assert submitted(login_node, "whole") == EVERY
    return "whole"


def test_the_study_gives_the_digest_of_a_local_run(login_node: Node, study: str, sif: Path, local_digest: str) -> None:
    said = login_node.run(["cmrhpc", "verify", study], env=login.HERE).stdout.splitlines()[-1]
    assert re.fullmatch(r"digest [0-9a-f]{64}", said)
    assert said == local_digest
    ours = sif.with_name("cmrhpc.sif.sha256").read_text()[:64]
    shards = [*(login_node.shared / study).rglob("*.h5")]
    assert {h5py.File(path).attrs["container_sha256"] for path in shards} == {ours.encode()}
    code, told, _ = submit(login_node, study, "--yes")
    assert (code, told["arrays"]) == (0, [])


def test_tasks_that_shared_a_gpu_have_their_own_shard_log_and_record(login_node: Node, study: str) -> None:
    root = login_node.shared / study
    shared = [json.loads(p.read_text()) for p in (root / "submissions").glob("*.json")]
    pairs = [e for told in shared for e in told["elements"] if told["stage"] == "classify" and len(e) == 2]
    assert len(pairs) == 4
    for index in (index for pair in pairs for index in pair):
        assert "done in" in (root / f"logs/classify_{index}.log").read_text()
        assert json.loads((root / f"logs/classify_{index}.json").read_text())["state"] == "done"


def test_a_failed_task_holds_up_nobody_who_does_not_need_it(login_node: Node, study: str, local_digest: str) -> None:
    node = login_node
    node.run(f"cp -a {study} failing; cd failing; rm -rf submissions report index.json; rm predictions/*/*/*/fold0*")
    # A folder where the shard should go: the task runs and cannot write.
    bad = "failing/synthetic/dae-gan/fold0_repeat0_class0.h5"
    node.run(f"rm {bad}; mkdir {bad}")
    code, told, _ = submit(node, "failing", "--yes")
    assert code == 0
    sent = {stage: row["tasks"] for stage, row in told["stages"].items()}
    assert sent == {"synthesize": 1, "refine": 1, "classify": 5, "aggregate": 1}
    # Where shards of the same kind are there, their time is what is expected.
    assert told["stages"]["classify"]["measured"] == 5
    assert told["stages"]["classify"]["gpu_hours"] < 1
    jobs = {array["name"]: array["job"] for array in told["arrays"]}
    wait_for_all(node)
    codes = node.run(["sacct", "-n", "-X", "-P", "-j", ",".join(jobs.values()), "-o", "jobid,exitcode"]).stdout.split()
    by_job = {line.split("|")[0]: line.split("|")[1] for line in codes}
    assert by_job[jobs["synthesize-r0f0"]] == "3:0"
    assert by_job[jobs["refine-r0f0"]] == "3:0"  # what has the name of its input is damage
    plan = json.loads(node.run(["cmrhpc", "plan", "failing", "--json"], env=login.HERE).stdout)["stages"]
    assert {stage: row["missing"] for stage, row in plan.items()} == {
        "ingest": 0, "synthesize": 1, "refine": 1, "classify": 3, "aggregate": 0
    }  # fmt: skip
    table = (node.shared / "failing/report/table.csv").read_text().splitlines()
    column = table[0].split(",").index("n_missing")
    assert sum(int(float(line.split(",")[column])) for line in table[1:]) == 3

    # Mended: only what is missing goes out again, and the study is what it should be.
    node.run(f"rmdir {bad}")
    code, told, _ = submit(node, "failing", "--yes")
    sent = {stage: row["tasks"] for stage, row in told["stages"].items()}
    assert (code, sent) == (0, {"synthesize": 1, "refine": 1, "classify": 3, "aggregate": 1})
    wait_for_all(node)
    assert node.run(["cmrhpc", "verify", "failing"], env=login.HERE).stdout.splitlines()[-1] == local_digest


FROM_PYTHON = """
import sys, submitit, cmrhpc
executor = submitit.AutoExecutor("slurm_logs")
executor.update_parameters(slurm_partition="gpu", slurm_wckey=None)
jobs = cmrhpc.submit("python", executor, profile="profile.toml")
print(*(job.job_id for job in jobs))
print(*(job.result() for job in jobs), sep="\\n")
assert executor._executor.parameters["partition"] == "gpu" and "dependency" not in executor._executor.parameters
"""


def test_from_python_with_the_users_own_executor(login_node: Node, study: str, local_digest: str) -> None:
    node = login_node
    node.run(f"cp -a {study} python; cd python; rm -r submissions report; rm predictions/none/*/*/fold0*")
    said = node.run(["python", "-c", FROM_PYTHON], env=login.HERE, timeout=900).stdout.splitlines()
    assert len(said[0].split()) == 2
    assert said[1:] == ["classify 0: exit code 0", "aggregate 0: exit code 0"]
    assert node.run(["cmrhpc", "verify", "python"], env=login.HERE).stdout.splitlines()[-1] == local_digest


def test_stopped_and_preempted_a_task_goes_on(login_node: Node) -> None:
    """USR2 to the element's step, as before the time limit, and a partition that preempts."""
    node = login_node
    make_study(node, "stopped")
    text = (node.shared / "stopped/study.toml").read_text().replace("generations = 4", "generations = 1500")
    (node.shared / "stopped/study.toml").write_text(text)
    node.run(["cmrhpc", "ingest", "stopped"], env=login.HERE)
    write_profile(node, profile(container=True))
    code, told, _ = submit(node, "stopped", "--yes")
    assert code == 0
    jobs = {array["name"]: array["job"] for array in told["arrays"]}
    element = f"{jobs['synthesize-r0f0']}_0"
    node.run(["scancel", *(job for name, job in jobs.items() if name != "synthesize-r0f0")])
    node.run(["scancel", f"{jobs['synthesize-r0f0']}_1"])

    def at_work(since: float) -> float:
        """Waits until the task has started after that time; when it did."""
        record = node.shared / "stopped/logs/synthesize_0.json"
        end = time.monotonic() + 300
        while time.monotonic() < end:
            state = json.loads(record.read_text()) if record.exists() else {"state": "", "time": 0}
            if state["state"] == "running" and state["time"] > since:
                time.sleep(4)
                return float(state["time"])
            time.sleep(0.2)
        raise TimeoutError(node.run(["scontrol", "show", "job", element]).stdout)

    begun = at_work(0)
    node.run(["scancel", "--signal=USR2", element])
    begun = at_work(begun)
    assert list((node.shared / "stopped/checkpoints").rglob("step*"))
    sent = submit(node, "stopped", "--dry-run")[1]["arrays"]
    assert ("synthesize", [0]) not in [(a["stage"], e) for a in sent for e in a["elements"]]  # it is queued

    urgent = node.submit("true", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    assert node.wait(urgent) == {"COMPLETED"}
    at_work(begun)
    shown = node.run(["scontrol", "show", "job", element]).stdout
    assert "Restarts=2" in shown, shown
    node.wait(jobs["synthesize-r0f0"], timeout=900)
    assert node.states(jobs["synthesize-r0f0"])[element] == "COMPLETED"
    assert "done in" in (node.shared / "stopped/logs/synthesize_0.log").read_text()
    assert not list((node.shared / "stopped/submissions").rglob("*.save_tmp"))


# ------------------------------------------------------------------------------------------------ without


@pytest.fixture(scope="module")
def narrow_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A cluster whose arrays have four elements at most, and no image: tasks that need torch say so and end."""
    binds = [b for b in image.binds(Path("/nowhere/x")) if b.target != "/images"]
    conf = {"MaxArraySize": 4}
    with Node(shared=tmp_path_factory.mktemp("shared"), binds=[*binds, login.login()], conf=conf) as node:
        node.run(["cmrhpc", "phantom", "raw", "--patients", "12", "--seed", "3"], env=login.HERE)
        yield node


def make(node: Node, name: str) -> None:
    from tests.conftest import STUDY

    node.run(["mkdir", name])
    node.run(["tee", f"{name}/study.toml"], input=STUDY.replace('raw = "raw"', 'raw = "../raw"'))


def test_short_arrays_hold_every_task_once(narrow_node: Node) -> None:
    node = narrow_node
    make(node, "short")
    write_profile(node, profile(lines='"true"'))
    text = (node.shared / "short/study.toml").read_text().replace("k = 2", "k = 3")
    (node.shared / "short/study.toml").write_text(text)
    code, told, _ = submit(node, "short", "--yes")
    assert code == 0
    assert max(len(array["elements"]) for array in told["arrays"]) == 4
    sent = submitted(node, "short")
    assert set(sent.values()) == {1}
    assert Counter(stage for stage, _ in sent) == {
        "ingest": 1,
        "synthesize": 6,
        "refine": 6,
        "classify": 15,
        "aggregate": 1,
    }
    wait_for_all(node)
    assert node.run("find short/submissions ! -type l -perm /o=rwx").stdout == ""
    # Every task ran once and said why it could not; the report came last, and in any case.
    for stage, index in sent:
        words = {"ingest": "folds", "synthesize": "torch is not installed", "aggregate": "predictions"}
        log = (node.shared / f"short/logs/{stage}_{index}.log").read_text()
        assert words.get(stage, "torch is not installed" if "torch" in log else "its input is not there") in log
        assert log.count("mend:") <= 1


def test_plain_sbatch_with_an_offset_reaches_every_task(narrow_node: Node) -> None:
    node = narrow_node
    make(node, "plain")
    here = {**login.HERE, "CMRHPC_SLURM": "/tree/slurm"}
    refused = node.run(
        "sbatch --array=$(cmrhpc plan plain --stage classify --array) --wrap true", env=here, check=False
    )
    assert "Invalid job array" in refused.stderr
    assert "MaxArraySize of this cluster is 4" in refused.stderr
    line = (  # no other variable reaches the job
        "cmrhpc plan plain --stage classify --array --offset | while read -r range offset; do sbatch --gres=none "
        "--mem=1G --export=PATH,CMRHPC_SLURM --array=$range /tree/slurm/classify.sbatch plain $offset; done"
    )
    assert node.run(line, env=here).stdout.count("Submitted") == 3
    wait_for_all(node)
    logs = {p.name: p.read_text() for p in (node.shared / "plain/logs").glob("classify_*.log")}
    assert set(logs) == {f"classify_{i}.log" for i in range(10)}
    titles = {re.search(r"cmrhpc: (.*): its input is not there", text)[1] for text in logs.values()}  # type: ignore[index]
    assert len(titles) == 10


def test_plain_sbatch_that_has_begun_is_left_out(narrow_node: Node) -> None:
    node = narrow_node
    make(node, "mixed")
    write_profile(node, profile(lines='"true"'))
    work = "#!/bin/bash\ncmrhpc task mixed --stage classify --index $((SLURM_ARRAY_TASK_ID + 4)); sleep 600\n"
    line = ["sbatch", "--parsable", "--job-name=classify", "--array=0-2%1", "--mem=1G", "--output=/dev/null"]
    job = node.run([*line, "--hold"], input=work, env=login.HERE).stdout.strip()
    _, told, _ = submit(node, "mixed", "--dry-run")
    assert told["queued"] == 0
    assert f"perhaps for this workspace: job {job}; its tasks would run twice" in told["notes"][0]
    node.run(["scontrol", "release", job])
    eventually(lambda: (node.shared / "mixed/logs/classify_4.json").exists())
    _, told, _ = submit(node, "mixed", "--dry-run")
    assert (told["queued"], told["notes"]) == (3, [])
    assert told["stages"]["classify"]["tasks"] == 7
    node.run(["scancel", job])


def test_an_empty_range_runs_nothing(narrow_node: Node) -> None:
    """sbatch takes it, for a job that is no array."""
    node = narrow_node
    make(node, "empty")
    line = "sbatch --parsable --array= --gres=none --mem=1G --output=empty.out /tree/slurm/classify.sbatch empty"
    job = node.run(line, env={**login.HERE, "CMRHPC_SLURM": "/tree/slurm"}).stdout.strip()
    assert node.wait(job) == {"FAILED"}
    assert "empty --array" in (node.shared / "empty.out").read_text()
    assert not (node.shared / "empty/logs").exists()


def test_every_file_is_shown_and_accepted(narrow_node: Node) -> None:
    node = narrow_node
    wait_for_all(node)  # what other tests sent
    make(node, "dry")
    write_profile(node, profile(lines='"true"', more='gpus = "tesla:1"\npartition = "urgent,gpu"\n'))
    code, told, _ = submit(node, "dry", "--dry-run")
    assert code == 0
    assert [file["accepted"] for file in told["scripts"]] == [True] * len(told["arrays"])
    assert "#SBATCH --gpus-per-node=tesla:1\n" in told["scripts"][-2]["script"]
    assert not (node.shared / "dry/submissions").exists()
    assert node.run(["squeue", "--noheader"]).stdout == ""

    # What is sent is what was shown, but for the numbers of the jobs.
    _, sent, _ = submit(node, "dry", "--yes")
    node.run("scancel --me")
    jobs = {array["name"]: array["job"] for array in sent["arrays"]}
    for file in told["scripts"]:
        found = [*(node.shared / "dry/submissions/submitit").glob(f"{file['name']}-*/*submission.sh")]
        name = re.escape(file["name"])
        found = [path for path in found if re.fullmatch(rf"{name}-[0-9a-f]{{8}}", path.parent.name)]
        assert len(found) == 1
        token = found[0].parent.name[-8:]
        shown = file["script"].replace("TOKEN", token)
        for other, job in sorted(jobs.items(), key=lambda item: -len(item[0])):
            shown = re.sub(rf"(?m)^(#SBATCH --dependency=.*[:,]){other}(?=[:,]|$)", rf"\g<1>{job}", shown)
            shown = re.sub(rf"(?m)^(#SBATCH --dependency=.*[:,]){other}(?=[:,]|$)", rf"\g<1>{job}", shown)
        assert found[0].read_text() == shown


def test_a_profile_that_the_cluster_refuses_is_told_before_and_at_submission(narrow_node: Node) -> None:
    node = narrow_node
    make(node, "refused")
    write_profile(node, profile(lines='"true"', slurm='partition = "nowhere"'))
    code, told, complaint = submit(node, "refused", "--dry-run", check=False)
    assert code == 3
    assert {file["accepted"] for file in told["scripts"]} == {False}
    assert "nvalid partition" in told["scripts"][0]["answer"]
    code, _, complaint = submit(node, "refused", "--yes", check=False)
    assert code == 3
    assert "nvalid partition" in complaint
    assert "Traceback" not in complaint
    assert not list((node.shared / "refused/submissions").glob("*.json"))
    assert not list((node.shared / "refused/submissions/submitit").iterdir())


def test_nobody_is_asked_without_a_terminal(narrow_node: Node) -> None:
    make(narrow_node, "asked")
    write_profile(narrow_node, profile(lines='"true"'))
    code, _, complaint = submit(narrow_node, "asked", check=False)
    assert code == 2
    assert "--yes" in complaint
    assert not (narrow_node.shared / "asked/submissions").exists()


def test_ingest_that_fails_leaves_nothing_pending(narrow_node: Node) -> None:
    node = narrow_node
    make(node, "no-raw")
    text = (node.shared / "no-raw/study.toml").read_text().replace("../raw", "../elsewhere")
    (node.shared / "no-raw/study.toml").write_text(text)
    write_profile(node, profile(lines='"true"'))
    _, told, _ = submit(node, "no-raw", "--yes")
    wait_for_all(node, 120)
    states = {array["name"]: set(node.states(array["job"]).values()) for array in told["arrays"]}
    assert states.pop("ingest") == {"FAILED"}
    assert states.pop("aggregate") <= {"FAILED", "COMPLETED"}
    assert set().union(*states.values()) == {"CANCELLED"}


def test_two_at_once_send_every_task_once(narrow_node: Node) -> None:
    node = narrow_node
    wait_for_all(node)  # what other tests sent
    make(node, "race")
    write_profile(node, profile(lines='"true"', slurm='options = ["--begin=now+1hour"]'))
    line = ["cmrhpc", "submit", "race", "--profile", "profile.toml", "--yes"]
    both = [node.popen(line, env=login.HERE) for _ in range(3)]
    said = [process.communicate(timeout=300) for process in both]
    codes = [process.returncode for process in both]
    assert set(codes) <= {0, 4}, said
    assert 0 in codes
    assert submitted(node, "race") == EVERY
    queued = node.run(["squeue", "--noheader", "--array", "--format=%j"]).stdout.split()
    assert len(queued) == 20

    # A submission that was killed before it could note a job finds it in the queue.
    record = min((node.shared / "race/submissions").glob("*.json"))
    told = json.loads(record.read_text())
    note = node.shared / "race/submissions/asked" / f"{told['name']}.json"
    record.unlink()
    note.write_text(json.dumps({name: value for name, value in told.items() if name != "sha256"} | {"job": ""}))
    shutil.chown(note, 1000, 1000)
    code, again, _ = submit(node, "race", "--yes")
    assert (code, again["arrays"], again["queued"]) == (0, [], 20)
    assert json.loads(record.read_text()) == told
    assert not note.exists()
    node.run("scancel --me")


def test_out_of_time_asks_for_more(narrow_node: Node) -> None:
    node = narrow_node
    make(node, "slow")
    write_profile(node, profile(time="00:01:00", lines='"sleep 300"', slurm='max_time = "00:03:00"'))
    _, told, _ = submit(node, "slow", "--yes")
    ingest = told["arrays"][0]["job"]
    assert node.wait(ingest, timeout=300) == {"TIMEOUT"}
    node.run("scancel --me")
    wait_for_all(node)
    _, told, _ = submit(node, "slow", "--dry-run")
    assert told["arrays"][0]["time"] == "00:02:00"
    assert "#SBATCH --time=2\n" in told["scripts"][0]["script"]
    assert told["notes"] == ["ingest: 1 task ran out of time; asking for 00:02:00 instead of 00:01:00"]


def test_when_the_cluster_takes_no_more_the_same_command_goes_on(tmp_path: Path) -> None:
    binds = [b for b in image.binds(Path("/nowhere/x")) if b.target != "/images"]
    with Node(shared=tmp_path, binds=[*binds, login.login()], conf={"AccountingStorageEnforce": "limits,qos"}) as node:
        add = "sacctmgr --immediate add"
        node.run(f"{add} account study; {add} user hpc account=study maxsubmitjobs=8", user="root")
        # A limit that no waiting mends is told by the same words of Slurm's, and is not taken for one that it does.
        node.run(f"{add} qos brief flags=DenyOnLimit maxwall=00:10:00", user="root")
        node.run("sacctmgr --immediate modify user hpc set qos+=brief", user="root")
        make(node, "brief")
        write_profile(node, profile(lines='"true"', slurm='qos = "brief"'))
        code, _, complaint = submit(node, "brief", "--yes", check=False)
        assert code == 3
        assert "QOSMaxWallDurationPerJobLimit" in complaint
        assert "sent:  0 of 20 tasks" in complaint

        make(node, "full")
        write_profile(node, profile(lines='"true"', slurm='options = ["--begin=now+1hour"]'))
        code, _, complaint = submit(node, "full", "--yes", check=False)
        assert code == 4
        assert "takes no more jobs now" in complaint
        assert "sent:  8 of 20 tasks" in complaint
        assert sum(submitted(node, "full").values()) == 8
        code, _, complaint = submit(node, "full", "--yes", check=False)
        assert (code, "sent:  0 of 12 tasks" in complaint) == (4, True)
        node.run("sacctmgr --immediate modify user hpc set maxsubmitjobs=100", user="root")
        assert submit(node, "full", "--yes")[0] == 0
        assert submitted(node, "full") == EVERY
