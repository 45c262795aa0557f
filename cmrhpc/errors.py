"""Errors that users see: what is wrong, where, and how to mend it. Each kind has its exit code."""

from __future__ import annotations


def printable(text: str) -> str:
    """Control characters but line breaks written out (\\x1b): a name or a record gives the terminal no commands."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CmrhpcError(Exception):
    """Base of every error that is reported as one message and never as a traceback.

    what: one sentence, what is wrong. where: file, row, field. mend: how to mend it. found: the offending value, which
    may hold a patient or file name; shown on the terminal (`for_a_person`), never logged. An error of no kind below is
    a task that failed, as a training that diverged.
    """

    exit_code = 4
    kept = False  # whether the task has written its output all the same

    def __init__(self, what: str, where: str = "", mend: str = "", found: str = ""):
        self.what, self.where, self.mend, self.found = what, where, mend, found
        super().__init__(what, where, mend, found)

    def for_a_person(self) -> str:
        """All of it."""
        return printable(f"{self}\n  found: {self.found}") if self.found else str(self)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.mend:
            lines.append(f"  mend:  {self.mend}")
        return printable("\n".join(lines))


class UsageError(CmrhpcError):
    """The command was called wrongly."""

    exit_code = 2


class BadInput(CmrhpcError):
    """Data, study file, profile or a shard from elsewhere cannot be used."""

    exit_code = 3


class Incomplete(CmrhpcError):
    """Tasks failed or are missing; what exists was kept."""

    exit_code = 4


class Damage(CmrhpcError):
    """A file is damaged, or a patient leaks from training into test."""

    exit_code = 5


class Checkpointed(CmrhpcError):
    """Stopped on request after a checkpoint was saved: run the same task again."""

    exit_code = 75


EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # whoever read the output has left, as in `| head`; what a shell says of SIGPIPE

_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")  # in torch's RuntimeErrors


def explained(error: BaseException, see: str = "--debug shows where") -> CmrhpcError:
    """Any error as one message. The name of a file, which may be a patient's, is for a terminal only."""
    if isinstance(error, CmrhpcError):
        return error
    text = str(error)
    if isinstance(error, OSError):
        found = str(error.filename or ("" if error.strerror else text))
        return BadInput(error.strerror or type(error).__name__, "", f"mend the file system; {see}", found)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in _MEMORY)):
        where = "on the GPU" if "CUDA" in text or "CUBLAS" in text else ""
        return Incomplete("out of memory", where, "lower --jobs, tasks_per_gpu of the profile, or batch of the study")
    first = next(iter(text.splitlines()), "no message")  # torch's go on about its compile flags
    return Incomplete(f"{type(error).__name__}: {first}", "", see)
