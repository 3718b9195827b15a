"""Sums for many parameters in one buffer, so that noise is drawn, scaled and cast once for all of them.

An adapted U-Net has hundreds of small parameters: in a small step, launching a few operations for each would take longer than
their arithmetic.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Alike = tuple[torch.device, torch.dtype]  # parameters that agree in these share a buffer


class FlatSums:
    """The sums of a step, zero at the start, in float64, so that rounding does not add up over micro-batches.

    Attributes:
        buffers: the 1-d sums for the parameters of each device and dtype.
        by_name: views of the buffers by parameter name, each in its parameter's shape.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._shapes: dict[Alike, dict[str, torch.Size]] = defaultdict(dict)
        for name, p in parameters.items():
            self._shapes[p.device, p.dtype][name] = p.shape
        self.buffers = {(device, dtype): self._zeros(device, dtype) for device, dtype in self._shapes}
        self.by_name = self.parted(self.buffers)

    def _zeros(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        numbers = sum(shape.numel() for shape in self._shapes[device, dtype].values())
        return torch.zeros(numbers, dtype=torch.float64, device=device)

    def fit(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Tell whether the parameters still have the devices, dtypes and shapes for which the sums were made."""
        shapes = self._shapes
        return all(p.shape == shapes.get((p.device, p.dtype), {}).get(name) for name, p in parameters.items())

    def add_(self, parts: Mapping[str, Tensor | None]) -> None:
        """Add parts [*parameter.shape] to the sums of the parameters that they name; None adds nothing."""
        pairs = [(self.by_name[name], part) for name, part in parts.items() if part is not None]
        groups: dict[bool, list] = {True: [], False: []}
        for pair in pairs:  # those that agree in dtype and strides are added in few launches, all others one by one
            total, part = pair
            groups[total.dtype == part.dtype and total.stride() == part.stride()].append(pair)
        for group in filter(None, groups.values()):
            torch._foreach_add_(*map(list, zip(*group)))

    def join_(self, other: "FlatSums") -> None:
        """Add `other`, the sums of the same parameters."""
        for alike, total in self.buffers.items():
            total += other.buffers[alike]

    def parted(self, buffers: Mapping[Alike, Tensor]) -> dict[str, Tensor]:
        """Return views of `buffers`, laid out like `self.buffers`, by parameter name and in the parameters' shapes."""
        views = {}
        for alike, shapes in self._shapes.items():
            parts = buffers[alike].split([shape.numel() for shape in shapes.values()])
            views |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
        return views
