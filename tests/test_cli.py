"""The command line: fast to start, one message per error, the exit codes of the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmrhpc import cli
from cmrhpc.errors import CmrhpcError
from cmrhpc.launch.records import read_record
from tests.whole.conftest import cmrhpc, make_workspace

VERBS = (
    "phantom",
    "init",
    "ingest",
    "plan",
    "task",
    "run",
    "submit",
    "status",
    "aggregate",
    "verify",
    "export",
    "doctor",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    assert f"example: cmrhpc {verb}" in cmrhpc(verb, "--help").stdout


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cmrhpc.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'h5py', 'SimpleITK', 'submitit', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_names_of_the_package_are_no_modules() -> None:
    """A module of the same name, imported later, would take the place of the function."""
    code = """
import pkgutil, cmrhpc
from cmrhpc import load_study, plan, submit
import cmrhpc.launch.local, cmrhpc.report.collect
assert all(callable(getattr(cmrhpc, name)) for name in cmrhpc.__all__)
assert (cmrhpc.plan, cmrhpc.submit, cmrhpc.load_study) == (plan, submit, load_study)
assert not set(cmrhpc.__all__) & {module.name for module in pkgutil.iter_modules(cmrhpc.__path__)}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    told = subprocess.run([sys.executable, "-m", "cmrhpc", "--version"], check=True, capture_output=True, text=True)
    assert told.stdout.startswith("cmrhpc ")


def test_planning_needs_no_torch(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom cmrhpc.cli import main\n"
        f"sys.exit(main(['plan', {str(tmp_path)!r}]) or main(['status', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "VERB"),
        (["nonsense"], 2, "nonsense"),
        (["statsu", "ws"], 2, 'did you mean "status"?'),
        (["plan"], 2, "WORKSPACE"),
        (["run", "ws", "--plian"], 2, 'did you mean "--plain"?'),
        (["run", "ws", "--jbos", "2"], 2, 'did you mean "--jobs"?'),
        (["run", "ws", "--zzz"], 2, "cmrhpc run --help"),
        (["plan", "ws", "--stage", "refin"], 2, 'did you mean "refine"?'),
        (["plan", "ws", "more"], 2, "unrecognized arguments: more"),
        (["--profile", "here", "submit", "ws"], 2, "options come after the verb"),
        (["--profile=here", "submit", "ws"], 2, "options come after the verb"),
        (["plan", "ws", "--stage", "refine", "--array", "--chunk", "0"], 2, "'0' is not a whole number from 1 up"),
        (
            ["plan", "ws", "--stage", "refine", "--array", "--offset", "--chunk", "-5"],
            2,
            "'-5' is not a whole number from 1 up",
        ),
        (["run", "ws", "--jobs", "-1"], 2, "'-1' is not a whole number from 1 up"),
        (["plan", "nowhere"], 3, "no study.toml"),
        (["plan", "no\x1b[2Jwhere"], 3, "no\\x1b[2Jwhere"),
        (["init", "ws", "--study", "demo2", "--raw", "."], 3, "shipped studies: demo, fu2021"),
        (["init", "ws", "--study", "demo", "--raw", "nowhere"], 3, "no such raw folder"),
        (["init", "ws", "--study", "demo", "--raw", ".", "--column", "patient"], 2, "OURS=THEIRS"),
        (["init", "ws", "--study", "demo", "--raw", ".", "--spacing", "-1"], 3, "where: --spacing"),
        (["task", "ws", "--stage", "ingest", "--index", "x"], 2, "invalid int"),
    ],
)
def test_errors_are_one_message_with_their_exit_code(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = cmrhpc(*arguments, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_task_whose_words_nobody_can_read_is_done_all_the_same(tmp_path: Path, study_text: str) -> None:
    root = make_workspace(tmp_path, study_text)
    command = f"{sys.executable} -m cmrhpc ingest {root} >&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert read_record(root / "logs" / "ingest_0.json").state == "done"
    assert "images" in (root / "logs" / "ingest_0.log").read_text()


def test_a_task_without_its_inputs_is_incomplete(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    done = cmrhpc("task", tmp_path, "--stage", "refine", "--index", "0", check=False)
    assert done.returncode == 4
    assert "its input is not there" in done.stderr
    before = os.listdir(tmp_path / "logs")
    assert cmrhpc("task", tmp_path, "--stage", "refine", "--index", "99", check=False).returncode == 2
    assert os.listdir(tmp_path / "logs") == before  # no record of a task that is not there


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("plan WS --stage classify", 141),
        ("status WS", 141),
        ("--help", 141),
        ("nonsense", 2),  # nothing is written into the pipe
        ("nonsense 2>&1", 141),
    ],
)
def test_a_reader_that_has_left_ends_the_command_quietly(tmp_path: Path, study_text: str, line: str, code: int) -> None:
    """A pipe whose other end is closed before the first word is written."""
    (tmp_path / "study.toml").write_text(study_text)
    script = (
        "{ until [ -e gone ]; do sleep 0.01; done; exec $PYTHON -m cmrhpc.cli LINE; } | { exec <&-; touch gone; }; "
        "exit ${PIPESTATUS[0]}"
    ).replace("LINE", line.replace("WS", "."))
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("PYTHONUNBUFFERED", None)  # the last words are then written when the command ends
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (code, "")
    assert (done.stderr == "") is (code == 141)


def test_a_run_whose_reader_has_left_saves_checkpoints_and_ends(tmp_path: Path, study_text: str) -> None:
    """Four generators that would take for ever run when the first classifier is done and cannot be told of."""
    root = make_workspace(tmp_path, study_text.replace("generations = 4", "generations = 1000000"))
    cmrhpc("ingest", root)
    command = [sys.executable, "-m", "cmrhpc.cli", "run", str(root), "--jobs", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.wait(120) == 141
        assert [line for line in process.stderr if not line.startswith(b"! --jobs 5")] == []  # too many for few cores
    states = [record.state for path in (root / "logs").glob("synthesize_*.json") if (record := read_record(path))]
    assert states == ["stopped"] * 4


def test_the_index_comes_from_slurm_or_is_asked_for(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    done = cmrhpc("task", tmp_path, "--stage", "refine", check=False, env={"PATH": "/usr/bin"})
    assert done.returncode == 2
    assert "--index" in done.stderr


def test_array_of_missing_tasks(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    assert cmrhpc("plan", tmp_path, "--stage", "classify", "--array").stdout == "0-9\n"
    assert (tmp_path / "logs").is_dir()  # before the first job makes it with the group of its user
    chunks = cmrhpc("plan", tmp_path, "--stage", "classify", "--array", "--chunk", "4").stdout
    assert chunks == "0-3\n4-7\n8-9\n"
    offsets = cmrhpc("plan", tmp_path, "--stage", "classify", "--array", "--chunk", "4", "--offset").stdout
    assert offsets == "0-3 0\n0-3 4\n0-1 8\n"
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    environment = {**os.environ, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    for size, shown in ((4, "0-3 0\n0-3 4\n0-1 8\n"), (0, "")):  # no higher index than the cluster takes, however asked
        scontrol.write_text(f"#!/bin/sh\necho 'MaxArraySize = {size}'\n")
        scontrol.chmod(0o755)
        line = ("plan", tmp_path, "--stage", "classify", "--array", "--chunk", "9", "--offset")
        done = cmrhpc(*line, check=False, env=environment)
        assert (done.returncode, done.stdout) == (0 if shown else 3, shown)
    assert "takes no job arrays" in done.stderr
    assert cmrhpc("plan", tmp_path, "--offset", check=False).returncode == 2
    assert cmrhpc("plan", tmp_path, "--stage", "classify", "--chunk", "4", check=False).returncode == 2
    for other in ("--json", "--why"):
        both = cmrhpc("plan", tmp_path, "--stage", "classify", "--array", other, check=False)
        assert (both.returncode, both.stdout) == (2, "")


def test_a_plan_says_why_tasks_are_missing_in_few_lines(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text.replace("repeats = 1", "repeats = 100"))
    lines = cmrhpc("plan", tmp_path).stdout.splitlines()
    assert "classify     1000 tasks       0 done    1000 missing" in lines
    assert lines[5:] == [
        "ingest: 1 not made yet",
        "synthesize: 400 not made yet; waits for ingest",
        "refine: 400 not made yet; waits for ingest, synthesize",
        "classify: 400 not made yet; waits for ingest",
        "classify: 400 not made yet; waits for ingest, synthesize",
        "classify: 200 not made yet; waits for ingest, refine",
        "aggregate: 1 not made yet; waits for classify",
    ]


def test_an_index_that_slurm_refuses_is_pointed_out(tmp_path: Path, study_text: str) -> None:
    text = study_text.replace("k = 2", "k = 2\nvalidation_fraction = 0.2").replace("repeats = 1", "repeats = 100")
    (tmp_path / "study.toml").write_text(text.replace("ratios = [1, 2]", "ratios = [0.5, 1, 2]"))
    done = cmrhpc("plan", tmp_path, "--stage", "classify", "--array")
    assert done.stdout == "0-1199\n"
    assert "MaxArraySize" in done.stderr


def test_submitting_without_slurm_says_so_and_the_files_are_shown_all_the_same(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    here = {"PATH": str(tmp_path)}
    done = cmrhpc("submit", tmp_path, "--profile", "template", "--yes", check=False, env=here)
    assert done.returncode == 3
    assert "Slurm is not installed here" in done.stderr
    done = cmrhpc("submit", tmp_path, "--profile", "template", "--dry-run", env=here)
    assert done.stdout.count("#!/bin/bash") == 11
    assert "not asked: sbatch is not installed here" in done.stdout
    assert not (tmp_path / "submissions").exists()


def test_an_offset_leads_to_the_task(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    job = ["task", tmp_path, "--stage", "refine"]
    for offset, words in (("2", "fold 1 repeat 0 class 1"), ("x", "CMRHPC_OFFSET")):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "CMRHPC_OFFSET": offset}
        assert words in cmrhpc(*job, check=False, env=environment).stderr


def test_the_next_command_can_be_pasted(tmp_path: Path, study_text: str) -> None:
    """Also where the path has spaces; ingest names the way onto a cluster as well."""
    make_workspace(tmp_path, study_text)
    root = tmp_path / "my study"
    said = cmrhpc("init", root, "--study", "demo", "--raw", tmp_path / "raw").stdout
    assert f"`cmrhpc ingest '{root}'`" in said
    said = cmrhpc("ingest", root).stdout
    assert f"`cmrhpc run '{root}'`" in said
    assert f"`cmrhpc submit '{root}' --profile P`" in said


def test_init_asks_for_the_positive_class_and_maps_columns(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "t.csv").write_text("file,what,who\na.png,sick,x\nb.png,well,y\n")
    for name in ("a.png", "b.png"):
        (raw / name).write_bytes(b"read by ingest only")
    common = ["init", tmp_path / "ws", "--study", "demo", "--raw", raw, "--table", "t.csv"]
    common += ["--column", "image=file", "--column", "label=what", "--column", "patient=who"]
    done = cmrhpc(*common, check=False)
    assert done.returncode == 3
    assert "--positive" in done.stderr
    assert not (tmp_path / "ws" / "study.toml").exists()
    cmrhpc(*common, "--positive", "sick", "--spacing", "1.25", "--channels", "3")
    text = (tmp_path / "ws" / "study.toml").read_text()
    assert 'classes = ["well", "sick"]' in text
    assert "channels = 3" in text
    assert "file_spacing_mm = 1.25" in text
    assert "# " in text
    assert cmrhpc(*common, "--positive", "sick", check=False).returncode == 3


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CmrhpcError("it diverged", mend="lower learning_rate"), 4, "lower learning_rate"),
        (KeyError("gone"), 4, "KeyError: 'gone'\n  mend:  --debug shows where"),
        (RuntimeError("CUDA error: an illegal address\nCompile with flags"), 4, "RuntimeError: CUDA error: an illegal"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            4,
            "out of memory\n  where: on the GPU\n  mend:  low",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "out of memory\n  mend:  lower --jobs"),
        (MemoryError(), 4, "out of memory"),
        (OSError(5, "Input/output error", "/raw/miller.mha"), 3, "found: /raw/miller.mha"),
    ],
)
def test_whatever_is_raised_is_one_message_and_debug_changes_no_exit_code(
    error: Exception, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(args: object) -> int:
        raise error

    for name in ("status", "task"):
        monkeypatch.setitem(cli.VERBS, name, verb)
    assert cli.main(["status", "ws"]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert cli.main(["status", "ws", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err
    cli.main(["task", "ws", "--stage", "ingest"])
    assert "miller" not in capsys.readouterr().err  # it goes to a log


def test_a_training_that_diverges_is_a_task_that_failed(tmp_path: Path, study_text: str) -> None:
    text = study_text.replace("steps = 3", "steps = 30\nlearning_rate = 1.0").replace(
        "image_size = 16", "image_size = 32"
    )
    root = make_workspace(tmp_path, text)
    cmrhpc("ingest", root)
    done = cmrhpc("task", root, "--stage", "classify", "--index", "0", check=False)
    assert (done.returncode, "diverged" in done.stderr) == (4, True), done.stderr


def test_every_task_has_one_log_however_it_was_started(tmp_path: Path, study_text: str) -> None:
    root = make_workspace(tmp_path, study_text)
    log = root / "logs/ingest_0.log"
    table = root / "raw/cohort.csv"
    whole = table.read_text()
    table.write_text(whole.replace(",", ",miller", 1))  # the heading: a column is not there
    told = cmrhpc("ingest", root, check=False).stderr
    assert "found:" in told
    assert "miller" in told
    assert told.splitlines()[0].removeprefix("cmrhpc: ") in log.read_text()
    assert "miller" not in log.read_text()
    table.write_text(whole)
    said = cmrhpc("ingest", root).stdout
    assert said.splitlines()[0] in log.read_text()
    assert (record := read_record(log.with_suffix(".json"))) is not None
    assert record.state == "done"
    # As task.sh starts it: all output goes to the log already.
    log = root / "logs/refine_0.log"
    log.touch()
    log.chmod(0o644)
    with log.open("a") as stream:
        line = [sys.executable, "-m", "cmrhpc.cli", "task", str(root), "--stage", "refine", "--index", "0"]
        assert subprocess.run(line, stdout=stream, stderr=stream).returncode == 4
    assert oct(log.stat().st_mode & 0o777) == oct(0o600)  # as the workspace has it
    assert log.read_text().count("its input is not there") == 1
    assert cmrhpc(*line[3:], check=False).returncode == 4
    assert log.read_text().count("its input is not there") == 2
