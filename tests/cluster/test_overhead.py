"""How long submitting and looking take, by the number of tasks. Prints figures (pytest -s) and asserts none of them.

python -m pytest -m slow -s tests/cluster/test_overhead.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmrhpc.study import STUDIES
from tests.cluster import image, login
from tests.cluster.node import Node
from tests.cluster.test_submit import profile, wait_for_all, write_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
# Ten cells on real images: 10 x k x repeats tasks in one array.
STUDY = """
name = "many"
classes = ["0", "1"]
[data]
raw = "../raw"
image_size = 16
spacing_mm = 5.0
[folds]
k = {k}
repeats = {repeats}
[classifiers.resnet50]
[[arms]]
name = "none"
[[arms]]
name = "repeat-real"
ratios = [1, 2, 3, 4, 5, 6, 7, 8, 9]
[primary]
classifier = "resnet50"
arm = "repeat-real"
ratio = 1
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A cluster that takes tens of thousands of jobs."""
    binds = [b for b in image.binds(Path("/nowhere/x")) if b.target != "/images"]
    conf = {"MaxArraySize": 20001, "MaxJobCount": 60000}
    with Node(shared=tmp_path_factory.mktemp("shared"), binds=[*binds, login.login()], conf=conf) as running:
        running.run(["cmrhpc", "phantom", "raw", "--patients", "40", "--seed", "3"], env=login.HERE)
        yield running


def seconds(node: Node, *command: str) -> tuple[float, str]:
    begun = time.monotonic()
    said = node.run(["cmrhpc", *command], env=login.HERE, timeout=1800).stdout
    return time.monotonic() - begun, said


def measure(node: Node, name: str) -> str:
    """Submit and look, all of it waiting; then look again when everything has been taken away."""
    sent, said = seconds(node, "submit", name, "--profile", "profile.toml", "--yes", "--json")
    arrays = json.loads(said)["arrays"]
    tasks = sum(len(element) for array in arrays for element in array["elements"])
    again, _ = seconds(node, "submit", name, "--profile", "profile.toml", "--yes", "--json")
    waiting, _ = seconds(node, "status", name, "--json")
    node.run("scancel --me")
    wait_for_all(node)
    ended, _ = seconds(node, "status", name, "--json")
    return f"{tasks:>6} tasks {len(arrays):>4} arrays: submit {sent:6.1f} s, again {again:5.1f} s, " + (
        f"status {waiting:5.1f} s (waiting), {ended:5.1f} s (ended)"
    )


def test_overhead_by_number_of_tasks(node: Node) -> None:
    write_profile(node, profile(lines='"true"', slurm='options = ["--begin=now+2hours"]'))
    begun, _ = seconds(node, "--version")
    lines = [f"starting cmrhpc: {begun:.1f} s"]
    for k, repeats in ((5, 2), (10, 10), (10, 100)):
        name = f"many{10 * k * repeats}"
        node.run(["mkdir", name])
        node.run(["tee", f"{name}/study.toml"], input=STUDY.format(k=k, repeats=repeats))
        lines.append(measure(node, name))
    text = (STUDIES / "fu2021.toml").read_text().replace('raw = ""', 'raw = "../raw"')
    node.run(["mkdir", "fu2021"])
    node.run(["tee", "fu2021/study.toml"], input=text.replace("classes = []", 'classes = ["0", "1"]'))
    lines.append("fu2021: " + measure(node, "fu2021"))
    print("\n" + "\n".join(lines))


def test_a_thousand_tasks_that_do_nothing(node: Node) -> None:
    """Through the queue to their end: the job ends before it starts anything."""
    write_profile(node, profile(lines='"exit 0"'))
    node.run(["mkdir", "noop"])
    node.run(["tee", "noop/study.toml"], input=STUDY.format(k=10, repeats=10))
    node.run(["cmrhpc", "ingest", "noop"], env=login.HERE)
    sent, _ = seconds(node, "submit", "noop", "--profile", "profile.toml", "--yes", "--json")
    begun = time.monotonic()
    while_running, said = seconds(node, "status", "noop", "--json")
    wait_for_all(node)
    through = time.monotonic() - begun
    ended, said = seconds(node, "status", "noop", "--json")
    row = json.loads(said)["stages"]["classify"]
    assert (row["total"], row["done"], row["running"]) == (1000, 0, 0)
    print(
        f"\n1000 tasks that do nothing: submit {sent:.1f} s, status {while_running:.1f} s at work and {ended:.1f} s "
        f"at the end; the cluster took {through:.0f} s to run them"
    )
