"""The recipe of a table: its data, the methods with their settings, and how each setting was chosen."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeVar

from fastloda.errors import UserError
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import UNetConfig
from fastloda.synthesis.methods import ByEpsilon, Method
from fastloda.synthesis.settings import Classifier, UNetShape

from .published import Accuracies

T = TypeVar("T")
TableName = Literal["digits", "mnist5k", "table2", "table3", "table4"]
EPSILONS, DELTA = (1.0, 5.0, 10.0), 1e-5
BEFOREHAND = "set beforehand, after the method's paper; not tuned"


@dataclass(frozen=True)
class Variant:
    """How a table is to be computed.

    Attributes:
        data: folder of the published files; None for a table that needs none.
        quick: whether few steps and images are enough, to show that it runs.
        partial: whether a part of a published data set is enough.
        unet: shape of the U-Net in place of the table's.
    """

    data: Path | None = None
    quick: bool = False
    partial: bool = False
    unet: UNetShape | None = None

    def shape(self, default: UNetConfig) -> UNetConfig:
        """Return the shape of the U-Net that was asked for, or the default; it fits the table's images."""
        if self.unet is None:
            return default
        return self.unet.sized(default.image_size, default.in_channels, default.num_classes)


@dataclass(frozen=True)
class Recipe:
    """The recipe of one table.

    Attributes:
        name, title, lead: name, headline, and a paragraph about the table.
        private, test, public: functions that read or draw the images.
        methods, epsilons: rows and columns, in the order of the paper.
        classifiers: name -> settings of each classifier that tests the images.
        synthetic_images: number of images that a method draws, if it draws any.
        how_chosen: part of the recipe -> how its hyper-parameters were chosen.
        published: published values, if the paper has this table.
        extractor_steps: number of training steps of the default feature extractor, on public images.
        public_seed: seed of the public models, shared by all seeds of the table; None: a public model for each seed.
        blind: whether all settings were chosen without knowing the results on the private or the test images.
    """

    name: TableName
    title: str
    lead: str
    private: Callable[[], LabelledImages]
    test: Callable[[], LabelledImages]
    public: Callable[[], LabelledImages]
    methods: Sequence[Method]
    classifiers: Mapping[str, Classifier]
    synthetic_images: int
    how_chosen: Mapping[str, str]
    epsilons: tuple[float, ...] = EPSILONS
    delta: float = DELTA
    published: Accuracies = field(default_factory=dict)
    extractor_steps: int = 500
    public_seed: int | None = None
    blind: bool = True

    def only(self, names: Sequence[str]) -> "Recipe":
        """Keep only the named rows, and add the user's own methods ("module:name"). Without names, all rows are kept.

        Raises:
            ValueError: the table has no such row, or a module has no such method.
        """
        known = {method.name: method for method in self.methods}
        own = {name: own_method(name) for name in names if ":" in name}
        if unknown := [name for name in names if name not in known | own]:
            raise UserError(f"{self.name} has no row {', '.join(unknown)}; it has {', '.join(known)}, or module:Class")
        if repeated := [method.name for method in own.values() if method.name in known]:
            raise UserError(f"{self.name} has a row {repeated[0]} already: give your method another name")
        if not names:
            return self
        how_chosen = dict(self.how_chosen) | {method.name: "by its author" for method in own.values()}
        methods = [(known | own)[name] for name in names]
        return replace(self, methods=methods, how_chosen=how_chosen, blind=self.blind and not own)


def own_method(place: str) -> Method:
    """Import a method of the user's own from "module:name": a class that needs no arguments, or an object, as `Method` describes.

    Raises:
        ValueError: there is no such module or name, or it is not a method.
    """
    module, _, name = place.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # an installed command does not search the current folder
    try:
        found = getattr(import_module(module), name)
        method = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"no method {place}: {error}") from error
    if lacking := [part for part in ("name", "trained_on", "has_budget", "fit") if not hasattr(method, part)]:
        raise UserError(f"{place} is no method, for it has no {', '.join(lacking)}: see fastloda.synthesis.methods")
    if type(method).__repr__ is object.__repr__:
        raise UserError(
            f"{place} needs a __repr__ of its settings, as a dataclass has: it tells finished cells from others"
        )
    return method


def by_epsilon(make: Callable[[float], T]) -> ByEpsilon[T]:
    """Make settings for each usual budget of a table."""
    return ByEpsilon({epsilon: make(epsilon) for epsilon in EPSILONS})
