"""The profile of a cluster: every key honoured, every mistake named with file, table, key and mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmrhpc.errors import BadInput
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
        ('[slurm]\noptions = ["-x"]', ["slurm.options number 1", "no long option"]),
        ('[slurm]\noptions = ["--exclude=n1", "--array=0-3"]', ["slurm.options number 2", "decided by cmrhpc submit"]),
        ('[slurm]\noptions = ["--mem=3G"]', ["--mem", "memory = ..."]),
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


@pytest.mark.parametrize(
    ("text", "mb"), [("8G", 8192), ("1500M", 1500), ("1500", 1500), ("2T", 2 * 1024**2), ("8gb", 8192)]
)
def test_memory_as_slurm_writes_it(text: str, mb: int) -> None:
    assert memory_mb(text) == mb
    assert memory_mb(memory_text(mb)) == mb


@pytest.mark.parametrize(
    ("gres", "gpus"), [("", 0), ("gpu", 1), ("gpu:2", 2), ("gpu:a100", 1), ("gpu:a100:4,nvme:1", 4)]
)
def test_gpus_of_a_gres(gres: str, gpus: int) -> None:
    assert parse_profile(f'[stages.classify]\ngres = "{gres}"').resources("classify").gpus == gpus
