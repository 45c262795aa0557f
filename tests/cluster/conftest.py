"""What the cluster tests share. Where no node can be started they are skipped with the reason, or fail when
``CMRHPC_CLUSTER=require`` says that this machine must be able to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import image, login, study
from tests.cluster.node import Node, why_not
from tests.conftest import STUDY


@pytest.fixture(scope="session", autouse=True)
def cluster_possible() -> None:
    """Skips, or fails where that was asked for, on a machine that cannot start a node."""
    if reason := why_not():
        if os.environ.get("CMRHPC_CLUSTER") == "require":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running cluster that the tests of a module share."""
    with Node(shared=tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture(scope="session")
def sif() -> Path:
    """The image, as `image.sif` builds it."""
    return image.sif()


@pytest.fixture(scope="module")
def container_node(sif: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running cluster that has the image, and the code of the working tree to bind over it."""
    with Node(shared=tmp_path_factory.mktemp("shared"), binds=image.binds(sif)) as running:
        yield running


@pytest.fixture(scope="module")
def login_node(sif: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The same, with the environment from which people submit (see `login.HERE`)."""
    with Node(shared=tmp_path_factory.mktemp("shared"), binds=[*image.binds(sif), login.login()]) as running:
        yield running


@pytest.fixture(scope="session")
def local_digest(sif: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The line with the digest that `cmrhpc run` inside the image gives for `make_study`."""
    with Node(shared=tmp_path_factory.mktemp("shared"), binds=image.binds(sif), slurm=False) as node:
        make_study(node, "local")
        node.run(f"{image.CMRHPC} run local", timeout=1500, env={"CMRHPC_CONTAINER_SHA256": ""})
        return node.run(f"{image.CMRHPC} verify local").stdout.splitlines()[-1]


def make_study(node: Node, *names: str) -> None:
    """A phantom and workspaces for the study of all stages, nothing run yet."""
    node.run(f"[ -d raw ] || {image.CMRHPC} phantom raw --patients 12 --seed 3; mkdir {' '.join(names)}")
    for name in names:
        node.run(["tee", f"{name}/study.toml"], input=STUDY.replace('raw = "raw"', 'raw = "../raw"'))


@pytest.fixture(scope="session")
def undisturbed(sif: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of `study.TEXT`, run inside the container without a cluster and without any fault."""
    return study.undisturbed(tmp_path_factory.mktemp("undisturbed"), sif)
