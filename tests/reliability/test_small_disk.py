"""A disk that is really full, and one that is really read-only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cmrhpc.shards import read_shard
from tests.conftest import ROOT
from tests.reliability.conftest import TIMEOUT, needs_root


@needs_root
def test_a_full_and_a_read_only_disk_are_one_clear_error_and_the_rerun_completes(
    undisturbed: Path, tmp_path: Path
) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    script = [sys.executable, "-m", "tests.reliability.small_disk", undisturbed, mount]
    done = subprocess.run(["unshare", "-m", *script], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    content = read_shard(undisturbed / told["output"]).content_sha256
    full = [one for one in told["tries"] if one["said"] != "done"]
    assert len(full) >= 5
    for one in full:
        assert one["said"].startswith("BadInput 3: "), one
        assert "No space left" in one["said"], one
    for one in [*told["tries"], told["read_only"]]:
        assert (one["left"], one["broken"], one["again"], one["content"]) == ([], [], "done", content), one
    assert told["read_only"]["said"].startswith("BadInput 3: ")
    assert not any(mount.iterdir())
