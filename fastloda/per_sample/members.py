"""The modules, parameters and buffers of a model, found by one walk over its modules.

`nn.Module`'s own methods walk once for each of the three. A private step needs all three, several times. On a small U-Net those
walks took a tenth of the step.
"""

from typing import NamedTuple, Self

from torch import Tensor, nn


class Members(NamedTuple):
    """The modules, parameters and buffers of a model by name. Shared ones appear once, under their first name."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        found = cls(dict(model.named_modules()), {}, {})
        seen: set[int] = set()
        for name, module in found.modules.items():
            prefix = f"{name}." if name else ""
            places: list[tuple[dict, dict]] = [
                (module._parameters, found.parameters),
                (module._buffers, found.buffers),
            ]
            for held, into in places:
                for key, tensor in held.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        into[prefix + key] = tensor
        return found
