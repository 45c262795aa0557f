"""All parameters of a module as one vector, and Adam on such vectors.

Offspring of one parent are rows of a matrix, so that their optimizer step is a handful of operations whatever the
number of layers, and a copy of a whole network with its optimizer state is one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNED = 4  # numbers of float32 that vectorised kernels on GPUs read at once: their weights start at a multiple


def flat_order(module: nn.Module) -> list[nn.Parameter]:
    """A module's parameters as they lie in its vector: those of odd sizes last, where they shift no other one."""
    return sorted(module.parameters(), key=lambda parameter: parameter.numel() % ALIGNED != 0)


class Flat:
    """Makes a module's parameters views of `vector` (P,) and its floating-point buffers views of `buffers` (B,).

    parameters: in the order of `vector`, which is that of everything packed and unpacked. 4-D weights are laid out in
    the vector in the module's memory format, so that channels-last stays channels-last.
    Writing into the vectors changes the module. The module must stay on its device afterwards.
    """

    def __init__(self, module: nn.Module):
        self.parameters = flat_order(module)
        self.channels_last = [p.dim() == 4 and not p.is_contiguous() for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.vector = self.pack([p.detach() for p in self.parameters])
        for parameter, view in zip(self.parameters, self.unpack(self.vector), strict=True):
            parameter.data = view
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        self.buffers = torch.cat([b.detach().flatten() for b in buffers]) if buffers else self.vector.new_zeros(0)
        for buffer, piece in zip(buffers, self.buffers.split([b.numel() for b in buffers]), strict=True):
            buffer.data = piece.view_as(buffer)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter, in their order and of its shape -> (P,)."""
        pieces = [
            (t.permute(0, 2, 3, 1) if last else t).reshape(-1)
            for t, last in zip(tensors, self.channels_last, strict=True)
        ]
        return torch.cat(pieces)

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """(P,) -> one view per parameter, of its shape."""
        views = []
        for piece, parameter, last in zip(vector.split(self.sizes), self.parameters, self.channels_last, strict=True):
            if last:
                n, c, height, width = parameter.shape
                views.append(piece.view(n, height, width, c).permute(0, 3, 1, 2))
            else:
                views.append(piece.view(parameter.shape))
        return views


EPS = 1e-8  # Adam's
Rates = tuple[float, float] | Tensor  # Adam's numbers of one step; on a GPU two numbers on it


def adam_rates(step: int, learning_rate: float, betas: tuple[float, float]) -> tuple[float, float]:
    """What Adam's step number `step` (from 1) divides the root of the second moment by, and its step size."""
    return (1 - betas[1] ** step) ** 0.5, learning_rate / (1 - betas[0] ** step)


def adam_step(
    vector: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rates: Rates,
    betas: tuple[float, float],
) -> None:
    """One step of Adam, in place on `vector`, `first` and `second` moments (any equal shapes).

    With numbers as rates the operations and their order are those of torch.optim.Adam.
    """
    for part in _parts(vector):
        pieces = (vector[..., part], gradient[..., part], first[..., part], second[..., part])
        _adam(*pieces, rates, betas)


def adam_children(
    parents: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    rates: Rates,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors and moments of the children (S * M, P) after their step; parents (S, P) have M children each.

    gradients: (S * M, P), parent by parent.
    """
    made = torch.empty_like(gradients), torch.empty_like(gradients), torch.empty_like(gradients)
    for part in _parts(gradients):
        for child, parent in zip(made, (parents, first, second), strict=True):
            child[:, part] = parent[:, part].repeat_interleave(len(gradients) // len(parents), dim=0)
        vector, m, v = (child[:, part] for child in made)
        _adam(vector, gradients[:, part], m, v, rates, betas)
    return made


def _adam(vector: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: Rates, betas: tuple[float, float]) -> None:
    beta1, beta2 = betas
    root, size = rates
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scaled = v.sqrt().div_(root).add_(EPS)
    if isinstance(size, Tensor):  # not read by Python, so that the step can be recorded
        vector.addcdiv_(m * size, scaled, value=-1)
    else:
        vector.addcdiv_(m, scaled, value=-size)


CACHED = 2**16  # numbers of each of five tensors that stay in a core's cache from one operation to the next


def _parts(vector: Tensor) -> list[slice]:
    """The pieces of the last axis that are worked on one after the other; on a GPU all at once."""
    length = vector.shape[-1]
    rows = max(1, vector.numel() // max(1, length))
    size = max(1, CACHED * torch.get_num_threads() // rows) if vector.device.type == "cpu" else max(1, length)
    return [slice(start, start + size) for start in range(0, length, size)]
