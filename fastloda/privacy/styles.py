"""The styles of clipping by name."""

from typing import Literal

from fastloda.errors import UserError
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.clip import Automatic, Flat, PerLayer

ClippingName = Literal["flat", "automatic", "per_layer", "adaptive"]
Clipping = ClippingName | Flat

STYLES: dict[str, Flat] = {style.name: style for style in (Flat(), Automatic(), PerLayer(), AdaptiveClipping())}


def clipping_style(clipping: Clipping) -> Flat:
    """The style itself, for its name or for itself.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(clipping, Flat):
        return clipping
    if not isinstance(clipping, str) or clipping not in STYLES:
        raise UserError(
            f"clipping must be one of {list(STYLES)}, or Automatic, PerLayer or AdaptiveClipping with settings; got {clipping!r}"
        )
    return STYLES[clipping]
