"""One finding of `cmrhpc doctor`: what was seen, whether it is well, and how to mend it."""

from __future__ import annotations

from typing import Any

Finding = dict[str, Any]


def finding(ok: bool, what: str, mend: str = "") -> Finding:
    """{"what", "ok", "mend"}; the mend of what is well is empty."""
    return {"what": what, "ok": ok, "mend": "" if ok else mend}
