"""A terminal that closes: the command stops as on other signals, unless it was told to stay."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

CODE = """
import os, signal
from cmrhpc.signals import Stopped, stopping_at_once
try:
    with stopping_at_once():
        os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
except Stopped:
    print("stopped")
"""


@pytest.mark.parametrize(("before", "told"), [(signal.SIG_DFL, "stopped"), (signal.SIG_IGN, "goes on")])
def test_a_closed_terminal_stops_what_does_not_ignore_it(before: signal.Handlers, told: str) -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(
        command, preexec_fn=lambda: signal.signal(signal.SIGHUP, before), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, told), done.stderr
