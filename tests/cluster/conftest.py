"""What the cluster tests share. Where no node can be started they are skipped with the reason, or fail when
``CMRHPC_CLUSTER=require`` says that this machine must be able to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import image
from tests.cluster.node import Node, why_not


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
