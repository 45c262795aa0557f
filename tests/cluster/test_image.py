"""The image from the project's own definition: what it holds, who may run it, and how it is built and pinned."""

from __future__ import annotations

import hashlib
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.cluster import image
from tests.cluster.node import Node

# The first to ask for the image builds it.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
EXEC = ["apptainer", "--quiet", "exec"]


def locked() -> dict[str, str]:
    """Name -> version of what the image must hold."""
    names = ("requirements.txt", f"requirements-torch{default_torch()}.txt")
    text = "".join((image.CONTAINERS / name).read_text() for name in names)
    return dict(re.findall(r"^(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}$", text, flags=re.MULTILINE))


def default_torch() -> str:
    found = re.search(r"^ *torch=(\S+)", (image.CONTAINERS / "cmrhpc.def").read_text(), flags=re.MULTILINE)
    assert found
    return found[1]


def test_holds_exactly_what_is_locked(container_node: Node) -> None:
    listed = container_node.run([*EXEC, image.SIF, "python", "-m", "pip", "list", "--format=freeze"]).stdout.split()
    held = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in listed)}
    for ours in ("cmrhpc", "pip"):  # the project itself, and what Debian's venv brings
        held.pop(ours)
    # torch's own version has the CUDA it was built for behind a plus sign.
    assert {name: version.split("+")[0] for name, version in held.items()} == locked()


def test_array_runs_in_it_with_and_without_gpu_libraries(container_node: Node) -> None:
    names = ["SLURM_ARRAY_TASK_ID", "CUDA_VISIBLE_DEVICES"]
    code = f"import os, torch, SimpleITK, submitit, cmrhpc\nprint(torch.__version__, *map(os.environ.get, {names}))\n"
    (container_node.shared / "import.py").write_text(code)
    line = (
        f"[ $SLURM_ARRAY_TASK_ID = 0 ] || nv=--nv; apptainer --quiet exec $nv {image.OVER} {image.SIF} python import.py"
    )
    job = container_node.submit(line, "--array=0-1", "--gres=gpu:1", "--output=import_%a.out")
    assert container_node.wait(job) == {"COMPLETED"}
    for index in "01":
        version, *words = (container_node.shared / f"import_{index}.out").read_text().splitlines()[-1].split()
        assert version.startswith(locked()["torch"])
        assert words == [index, index]


def test_any_user_read_only_without_home_or_network(container_node: Node) -> None:
    container_node.run(["useradd", "--uid", "4321", "--no-create-home", "guest"], user="root")
    closed = [*EXEC, "--containall", "--no-home", image.SIF]
    lines = "id -u; cmrhpc --version; touch /opt/x; python -c 'import matplotlib.pyplot'"
    said = container_node.run([*closed, "sh", "-c", lines], user="guest", cwd="/")
    assert re.fullmatch(r"4321\ncmrhpc \S+\n", said.stdout)
    assert "touch: cannot touch '/opt/x': Read-only file system" in said.stderr
    assert "matplotlib" not in said.stderr  # which complains when it finds no folder to write to


def test_run_test_help_and_labels(container_node: Node) -> None:
    assert "usage: cmrhpc" in container_node.run(["apptainer", "--quiet", "run", image.SIF, "--help"]).stdout
    container_node.run(["apptainer", "--quiet", "test", image.SIF])
    assert "--nv cmrhpc.sif run WORKSPACE" in container_node.run(["apptainer", "run-help", image.SIF]).stdout
    labels = container_node.run(["apptainer", "inspect", "--labels", image.SIF]).stdout
    assert f"cmrhpc.torch: {default_torch()}" in labels
    assert "org.opencontainers.image.licenses: Apache-2.0" in labels


def test_home_and_modules_of_the_user_are_not_imported(container_node: Node) -> None:
    container_node.run("mkdir -p /shared/evil && echo 'raise SystemExit(9)' > /shared/evil/numpy.py")
    environment = {"PYTHONPATH": "/shared/evil"}
    container_node.run([*EXEC, image.SIF, "python", "-c", "import numpy"], env=environment, cwd="/home/hpc")


def test_checksum_lies_beside_it(sif: Path) -> None:
    with open(sif, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert sif.with_name("cmrhpc.sif.sha256").read_text() == f"{digest}  cmrhpc.sif\n"


def test_base_is_pinned_to_what_a_registry_holds(node: Node) -> None:
    """--pin against a real registry, started in the node."""
    containers = node.shared / "project" / "containers"
    containers.mkdir(parents=True)
    for name in ("build.sh", "cmrhpc.def"):
        (containers / name).write_text((image.CONTAINERS / name).read_text())
    node.run("chown -R hpc /shared/project; mkdir -p /etc/containers/registries.conf.d", user="root")
    local = '[[registry]]\nlocation = "localhost:5000"\ninsecure = true\n'
    node.run(["tee", "/etc/containers/registries.conf.d/local.conf"], input=local, user="root")
    pin = ["bash", "project/containers/build.sh", "--base", "localhost:5000/debian:13-slim", "--pin"]
    failed = node.run(pin, check=False)
    assert failed.returncode == 2
    assert "nothing is pinned" in failed.stderr
    assert not (containers / "base.pin").exists()

    settings = (
        "{version: 0.1, storage: {filesystem: {rootdirectory: /var/lib/registry}}, http: {addr: 'localhost:5000'}}"
    )
    node.run(["tee", "/tmp/registry.yml"], input=settings, user="root")
    node.popen(["docker-registry", "serve", "/tmp/registry.yml"], user="root")
    node.run("tar -cf layer.tar project; until exec 3<> /dev/tcp/localhost/5000; do sleep 0.1; done")
    policy = '{"default": [{"type": "insecureAcceptAnything"}]}'
    node.run(["tee", "/etc/containers/policy.json"], input=policy, user="root")
    node.run("skopeo copy --quiet tarball:layer.tar docker://localhost:5000/debian:13-slim")
    node.run(pin)
    manifest = node.run("skopeo inspect --raw docker://localhost:5000/debian:13-slim").stdout
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    assert (containers / "base.pin").read_text() == f"localhost:5000/debian@sha256:{digest}\n"


def test_build_refuses_a_small_disk_and_an_unknown_torch(node: Node) -> None:
    project = node.shared / "small" / "containers"
    project.mkdir(parents=True)
    for name in ("build.sh", "cmrhpc.def"):
        (project / name).write_text((image.CONTAINERS / name).read_text())
    node.run("mkdir /small && mount -t tmpfs -o size=1G tmpfs /small", user="root")
    refused = node.run("bash small/containers/build.sh", env={"APPTAINER_TMPDIR": "/small"}, check=False)
    assert refused.returncode == 2
    assert "set APPTAINER_TMPDIR" in refused.stderr
    unknown = node.run("bash small/containers/build.sh --torch 1.0", check=False)
    assert unknown.returncode == 2
    assert "lock.py --torch 1.0" in unknown.stderr


def test_pip_inside_asks_the_index_that_is_configured_outside(tmp_path: Path) -> None:
    asked = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}/private/simple"
        built = image.run_build(tmp_path / "work", image.network_settings() | {"PIP_INDEX_URL": index})
        server.shutdown()
    assert built.returncode == 2
    assert "the image was not built" in built.stderr
    assert any(re.fullmatch("/private/simple/[a-z-]+/", path) for path in asked)
    assert not (tmp_path / "work" / "cmrhpc.sif").exists()


@pytest.mark.parametrize("path", sorted(image.CONTAINERS.glob("requirements*.txt")), ids=lambda path: path.name)
def test_locks_hold_hashes_and_name_no_index(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    assert all(re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+!]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines[1:])
