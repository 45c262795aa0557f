"""One finding of `cmrhpc doctor`: what was seen, whether it is well, and how to mend it."""

from __future__ import annotations

from typing import Any

Finding = dict[str, Any]


def finding(ok: bool, what: str, mend: str = "", needed: bool = True) -> Finding:
    """{"what", "ok", "mend", "needed"}; the mend of what is well is empty.

    needed: whether the work cannot be done while this is wrong. False: it may be well on the machine that does the
    work, or the work goes on without it.
    """
    return {"what": what, "ok": ok, "mend": "" if ok else mend, "needed": needed}


def broken(findings: list[Finding]) -> list[Finding]:
    """What is needed and not well: `cmrhpc doctor` ends with exit code 3 for these."""
    return [finding for finding in findings if finding["needed"] and not finding["ok"]]
