"""What a user of a cluster has on its login node: cmrhpc without torch, in a virtual environment of the node's Python.

The packages are the project's own lock; the code is the working tree's (see `image.TREE`).
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.cluster import cache, image
from tests.cluster.node import HPC, SEARCH_PATH, Bind, Node

LOGIN = "/login"
LOCK = image.CONTAINERS / "requirements.txt"
# With these variables a command of the node is one of that environment. matplotlib wants a place to write.
HERE = {"PATH": f"{LOGIN}/bin:{SEARCH_PATH}", "MPLCONFIGDIR": "/tmp/matplotlib"}
SCRIPT = f"#!{LOGIN}/bin/python\nimport sys\nfrom cmrhpc.cli import main\nsys.exit(main())\n"


def login() -> Bind:
    """What a node needs to see for `HERE` to hold. Built when the lock or the node's root has changed (a minute)."""
    key = cache.key_of(LOCK, cache.HERE / "node" / "build-root.sh", SCRIPT)
    return Bind(cache.cached("login", key, build), LOGIN)


def build(destination: Path) -> None:
    """Install the lock into a folder, in a node that reaches the network as the host does."""
    destination.mkdir()
    os.chown(destination, HPC, HPC)
    binds = [*image.network_files(), Bind(LOCK, "/opt/requirements.txt"), Bind(destination, LOGIN, writable=True)]
    pip = [f"{LOGIN}/bin/pip", "install", "--no-cache-dir", "--require-hashes", "--only-binary", ":all:"]
    with Node(network="host", slurm=False, binds=binds) as node:
        node.run(["python3", "-m", "venv", LOGIN])
        node.run([*pip, "--requirement", "/opt/requirements.txt"], env=image.network_settings(), timeout=1200)
        node.run(f"echo {image.TREE} > $(echo {LOGIN}/lib/python3.*/site-packages)/tree.pth")
        node.run(["tee", f"{LOGIN}/bin/cmrhpc"], input=SCRIPT)
        node.run(["chmod", "755", f"{LOGIN}/bin/cmrhpc"])
