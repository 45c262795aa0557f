"""The profile of a cluster: every key honoured, every mistake named with file, table, key and mend."""

from __future__ import annotations

import pwd
import shutil
from pathlib import Path

import pytest

from cmrhpc.errors import BadInput
from cmrhpc.launch.cluster import disk_findings
from cmrhpc.profile import load_profile, memory_mb, memory_text, parse_profile, time_seconds, time_text

TEMPLATE = Path(__file__).resolve().parent.parent / "slurm" / "profiles" / "template.toml"


def test_the_template_says_what_holds_where_a_profile_says_nothing() -> None:
    told, silent = load_profile(TEMPLATE), parse_profile("", "template.toml")
    assert told == silent
    assert load_profile("template") == told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[slurm]\npartion = "gpu"', ["[slurm]", "partion", 'did you mean "partition"']),
        ("[slrum]", ["slrum", 'did you mean "slurm"']),
        ('name = "x"', ['unknown key "name"']),
        ("[slurm]\nsignal_seconds = 1", ["slurm.signal_seconds", "10 to 3600"]),
        ('[slurm]\npartition = "a b"', ["slurm.partition", "one word"]),
        ('[slurm]\noptions = ["-x"]', ["slurm.options number 1", "not a long option"]),
        ('[slurm]\noptions = ["--exclude=n1", "--array=0-3"]', ["slurm.options number 2", "decided by cmrhpc submit"]),
        ('[slurm]\noptions = ["--mem=3G"]', ["--mem", "memory = ..."]),
        ('[slurm]\noptions = ["--clusters=far"]', ["slurm.options number 1", "export SLURM_CLUSTERS=NAME"]),
        ('[slurm]\noptions = ["--cluster=far"]', ["slurm.options number 1", "export SLURM_CLUSTERS=NAME"]),
        ('[stages.refine]\noptions = ["--quiet"]', ["stages.refine.options number 1", "take it out"]),
        ('[slurm]\noptions = ["-Mfar"]', ["slurm.options number 1", "not a long option"]),
        ('[slurm]\nmax_time = "soon"', ["slurm.max_time", "HH:MM:SS"]),
        ('[slurm]\nmax_time = "1:00:00"', ["stages.ingest.time", "above max_time"]),
        ('[slurm]\nmax_memory = "4G"', ["stages.ingest.memory", "above max_memory"]),
        ('[container]\nimage = "x.sif"\nbinds = ["/a b"]', ["container.binds number 1", "/a b"]),
        ('[container]\nbinds = ["/a"]', ["container.image", "name the image"]),
        ("[stages.clasify]", ["clasify", 'did you mean "classify"', "[stages]"]),
        ("[stages]\nclassify = 3", ["[stages] must hold tables"]),
        ("[stages.ingest]\ntasks_per_gpu = 2", ["tasks_per_gpu", "[stages.ingest]"]),
        ("[stages.classify]\ntasks_per_gpu = 0", ["stages.classify.tasks_per_gpu", "1 to 64"]),
        ('[stages.classify]\ntime = "3 hours"', ["stages.classify.time", "3 hours"]),
        ('[stages.classify]\ntime = "3"', ["stages.classify.time", "signal_seconds is 120"]),
        ('[stages.classify]\nmemory = "lots"', ["stages.classify.memory", "8G"]),
        ("[stages.classify]\ncpus = 2.5", ["stages.classify.cpus", "whole number"]),
        ('[stages.classify]\ngpus = "0"', ["stages.classify.gpus", "a100:1"]),
        ("[stages.classify]\ngpus = 1", ["stages.classify.gpus", "a text in quotes"]),
        ('[stages.classify]\ngpus = "1"\ngres = "gpu:1"', ["stages.classify.gres", "twice"]),
        ('[stages.ingest]\npartition = "a b"', ["stages.ingest.partition", "one word"]),
        ('[stages.ingest]\noptions = ["--mem=3G"]', ["stages.ingest.options number 1", "memory = ..."]),
        ('partition = "gpu"', ['unknown key "partition"', "belongs below [slurm] or [stages.STAGE]"]),
        ('image = "x.sif"', ['unknown key "image"', "belongs below [container]"]),
        ('[stages.classify]\nmem = "8G"', ['unknown key "mem"', "[stages.classify]", 'did you mean "memory"']),
        ("[slurm", ["not valid TOML"]),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as raised:
        load_profile(path)
    for word in [str(path), *words]:
        assert word in str(raised.value)


def test_a_name_is_looked_for_here_and_then_in_the_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, here = tmp_path / "config/cmrhpc/profiles", tmp_path / "slurm/profiles"
    for folder, partition in ((own, "mine"), (here, "ours")):
        folder.mkdir(parents=True)
        (folder / "tesla.toml").write_text(f'[slurm]\npartition = "{partition}"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert load_profile("tesla").slurm.partition == "ours"
    (here / "tesla.toml").unlink()
    assert load_profile("tesla").slurm.partition == "mine"


def test_a_user_without_a_home_is_told_as_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "XDG_CONFIG_HOME", "APPTAINER_CACHEDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(shutil, "which", lambda program: "/usr/bin/apptainer")
    with pytest.raises(BadInput, match="no such profile"):
        load_profile("nowhere")
    assert disk_findings()[-1]["what"].startswith("APPTAINER_CACHEDIR ~/.apptainer/cache")


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(BadInput, match="template"):
        load_profile("nowhere")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("30:30", 1830), ("1:00:00", 3600), ("1-12", 129600), ("1-12:30", 131400), ("2-00:00:01", 172801)],
)
def test_time_as_slurm_writes_it(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds
    assert time_seconds(time_text(seconds)) == seconds


def test_a_limit_is_whole_minutes_and_never_less_than_asked() -> None:
    told = parse_profile('[stages.classify]\ntime = "90:30"\n[stages.refine]\ntime = "2-00:00:01"\n')
    assert [told.resources(name).seconds for name in ("classify", "refine")] == [91 * 60, 2 * 86400 + 60]


@pytest.mark.parametrize(
    ("text", "mb"), [("8G", 8192), ("1500M", 1500), ("1500", 1500), ("2T", 2 * 1024**2), ("8gb", 8192)]
)
def test_memory_as_slurm_writes_it(text: str, mb: int) -> None:
    assert memory_mb(text) == mb
    assert memory_mb(memory_text(mb)) == mb


def test_a_stage_may_have_its_own_of_what_slurm_is_told() -> None:
    profile = parse_profile("""
        [slurm]
        partition = "gpu"
        account = "heart"
        constraint = "a100"
        options = ["--exclude=n7"]
        [stages.ingest]
        partition = "cpu,long"
        constraint = ""
        options = []
        [stages.classify]
        gpus = "a100:2"
    """)
    ingest, classify = profile.slurm_of("ingest"), profile.slurm_of("classify")
    assert (ingest.partition, ingest.account, ingest.constraint, ingest.options) == ("cpu,long", "heart", "", ())
    assert classify == profile.slurm
    assert (profile.resources("classify").gres, profile.gpus("classify")) == ("", 2)
    assert (profile.resources("refine").gres, profile.gpus("refine")) == ("gpu:1", 1)


def test_gpus_that_an_option_asks_for_are_counted() -> None:
    profile = parse_profile('[slurm]\noptions = ["--gpus-per-node=a100:2"]\n[stages.ingest]\noptions = ["--exclusive"]')
    assert [profile.gpus(stage) for stage in ("ingest", "classify", "aggregate")] == [0, 2, 2]


def test_paths_start_at_the_profiles_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    for image, whole in (
        ("images/x.sif", f"{tmp_path}/images/x.sif"),
        ("~/x.sif", "/home/me/x.sif"),
        ("$SCRATCH/x.sif", "/scratch/me/x.sif"),
    ):
        path = tmp_path / "mine.toml"
        path.write_text(f'[container]\nimage = "{image}"\nbinds = ["~/a", "$SCRATCH/b:/b:ro", "c:/c", "/d"]')
        container = load_profile(path).container
        assert container.image == whole
        assert container.binds == ("/home/me/a", "/scratch/me/b:/b:ro", f"{tmp_path}/c:/c", "/d")
    monkeypatch.setenv("SCRATCH", "/one,two")
    with pytest.raises(BadInput, match="/one,two/b"):
        load_profile(path)


@pytest.mark.parametrize(
    ("gres", "gpus"), [("", 0), ("gpu", 1), ("gpu:2", 2), ("gpu:a100", 1), ("gpu:a100:4,nvme:1", 4)]
)
def test_gpus_of_a_gres(gres: str, gpus: int) -> None:
    assert parse_profile(f'[stages.classify]\ngres = "{gres}"').gpus("classify") == gpus
