"""A training step recorded once as a CUDA graph and replayed.

A step of small networks is thousands of short kernels, and a GPU waits for Python to launch one after the other. A
graph is launched as a whole: the same kernels on the same memory. So whatever a step reads must lie in memory that
stays, its state and a copy of its inputs that is filled before each replay; and Python may decide nothing by values
that lie on the device.

A recording is trusted after it has made the same steps as the plain call, on different inputs; otherwise, or where
nothing can be recorded, the training goes on without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

In = TypeVar("In")  # a tensor, None, or a dataclass of such
Out = TypeVar("Out")

Capture = Callable[[Callable[[], Out]], tuple[Callable[[], None], Out]]

PLAIN = 2  # steps before the recording: shapes settle, libraries choose their ways and reserve their memory
CHECKS = 2  # replays that are held against the plain step
SPARE = 1  # further ones without deterministic algorithms, where the plain step alone may sort near equals otherwise
TOLERANCE = 0.05  # of what the step itself changes; a stale input or a lost update is off by all of it
CLOSE = 0.01  # difference of two outputs that is none: those near 0, as F_d may be, have no relative difference
# Share of state tensors allowed to differ: for a few the change is itself rounding error, so a relative difference
# means nothing.
ODD = 0.02


_refused = ""  # why a capture failed in this process: what CUDA holds after that is not tried a second time


def cuda_graph(step: Callable[[], Out]) -> tuple[Callable[[], None], Out]:
    """(replay, outputs): `outputs` lie where each replay writes them. The step runs once, before it is recorded.

    Raises RuntimeError where it cannot be recorded, and from then on always.
    """
    global _refused
    if _refused:
        raise RuntimeError(_refused)
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        step()
    here.wait_stream(aside)
    pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            outputs = step()
    except BaseException as error:
        _refused = _first_line(error)
        # A capture that CUDA has broken off leaves older versions of torch on the graph's stream, and their allocator
        # in the belief that it is still capturing.
        torch.cuda.set_stream(here)
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # of now, and of torch 2.6
        with contextlib.suppress(Exception):  # it has ended already
            end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
            end(torch.cuda.current_device(), pool)
        raise
    return graph.replay, outputs


class Recorded(Generic[In, Out]):
    """Calls `step(inputs) -> outputs`, from the third call on by replaying it.

    step: reads its inputs and the state, changes the state in place. state: the tensors that a step changes, always the
    same memory from the second step on. capture: `cuda_graph`. trouble: why the plain step is used, if it is.
    """

    def __init__(self, step: Callable[[In], Out], state: Callable[[], list[Tensor]], capture: Capture = cuda_graph):
        self.step, self.state, self.capture = step, state, capture
        self.plain, self.checks, self.spare = PLAIN, CHECKS, SPARE
        self.trouble = ""
        self.held: In | None = None
        self.outputs: Out | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, inputs: In) -> Out:
        if self.plain:
            self.plain -= 1
            return self.step(inputs)
        if self.replay is None and not self.trouble:
            self._record(inputs)
        if self.replay is None or not _fits(self.held, inputs):
            return self.step(inputs)
        for here, there in zip(_tensors(self.held), _tensors(inputs), strict=True):
            here.copy_(there)
        if self.checks:
            self.checks -= 1
            outputs = self._checked(inputs)
            if not self.checks:  # the plain step is not needed any more
                _empty_cache()
            return outputs
        self.replay()
        return _copied(self.outputs)

    def _record(self, inputs: In) -> None:
        """Record the step; the state stays as it is."""
        before: list[Tensor] = []
        why = ""
        try:
            before = _values(self.state())
            self.held = _copied(inputs)
            self.replay, self.outputs = self.capture(lambda: self.step(self.held))  # type: ignore[arg-type]
        except RuntimeError as error:  # no memory for it, or something that cannot be recorded
            why = _first_line(error)
        if why and torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()  # the step may still run on another stream
        if before:
            _restore(self.state(), before)
        del before
        if why:
            self._give_up(why)

    def _checked(self, inputs: In) -> Out:
        """One step in both ways, from the same state."""
        assert self.replay is not None
        before: list[Tensor] = []
        fits = True
        try:  # the plain step needs memory of its own beside the recorded one's
            before = _values(self.state())
            wanted = self.step(inputs)
            after = _values(self.state())
        except torch.OutOfMemoryError:
            fits = False
        if not fits:  # not inside `except`, where the traceback keeps all that the step had computed
            if before:
                _restore(self.state(), before)
            del before
            self._give_up("there is no memory for it beside the plain step, which it is held against")
            return self.step(inputs)
        _restore(self.state(), before)
        self.replay()
        made, now = self.outputs, self.state()
        odd = sum(not _near(b, a, n) for b, a, n in zip(before, after, now, strict=True))
        agrees = odd <= ODD * len(now)
        pairs = zip(_tensors(wanted), _tensors(made), strict=True)
        if agrees and all(torch.allclose(a, b, rtol=TOLERANCE, atol=CLOSE, equal_nan=True) for a, b in pairs):
            return _copied(made)
        _restore(now, after)
        if self.spare and not torch.are_deterministic_algorithms_enabled():
            self.spare -= 1
            self.checks += 1
        else:
            self._give_up("its replay made another step than the plain call")
        return wanted

    def _give_up(self, why: str) -> None:
        self.trouble = why
        warnings.warn(f"training goes on without a CUDA graph, slower: {why}", RuntimeWarning, stacklevel=4)
        self.held = self.outputs = self.replay = None
        _empty_cache()  # what the recording held


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _empty_cache() -> None:
    """Hand memory that no tensor uses back to the GPU, which other tasks may share."""
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _near(before: Tensor, after: Tensor, now: Tensor) -> bool:
    change, off = (float(torch.linalg.vector_norm((x.detach() - after).double())) for x in (before, now))
    return off <= TOLERANCE * change


def _values(state: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state]


@torch.no_grad()
def _restore(state: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a tensor, None or dataclass, in order."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _fits(held: Any, inputs: Any) -> bool:
    return [t.shape for t in _tensors(held)] == [t.shape for t in _tensors(inputs)]


def _copied(value: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None:
        return None
    return type(value)(**{field.name: _copied(getattr(value, field.name)) for field in dataclasses.fields(value)})
