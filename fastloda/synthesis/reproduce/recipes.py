"""All tables by name."""

from collections.abc import Callable
from dataclasses import replace

from fastloda.errors import UserError

from .digits_table import digits
from .mnist5k_table import mnist5k
from .paper_tables import paper
from .published import CIFAR10, CIFAR10_1PCT, MNIST
from .recipe import Recipe, TableName, Variant

RECIPES: dict[TableName, Callable[[Variant], Recipe]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "table2": lambda variant: paper(
        "table2",
        "Table II: CIFAR-10",
        ("cifar10", "imagenet10"),
        variant,
        CIFAR10,
        everything="imagenet32",
        private_epochs=200,
        batch_size=4096,
    ),
    "table3": lambda variant: paper(
        "table3",
        "Table III: 1% of CIFAR-10",
        ("cifar10", "imagenet10"),
        variant,
        CIFAR10_1PCT,
        everything="imagenet32",
        private_epochs=200,
        batch_size=64,
        epsilons=(1.0, 10.0),
        subset=0.01,
    ),
    "table4": lambda variant: paper(
        "table4",
        "Table IV: MNIST",
        ("mnist", "svhn"),
        variant,
        MNIST,
        private_epochs=100,
        batch_size=4096,
        epsilons=(10.0,),
    ),
}


def recipe(name: TableName, variant: Variant) -> Recipe:
    """Make the recipe of a table. A quick recipe says that it is quick, and says nothing on how its settings were chosen.

    Raises:
        ValueError: the name is unknown, or the table needs files and no folder was given.
    """
    if name not in RECIPES:
        raise UserError(f"the table must be one of {', '.join(RECIPES)}, got {name!r}")
    made = RECIPES[name](variant)
    if not variant.quick:
        return made
    lead = f"A quick run, to see that everything works: too few steps and images for results that mean anything. {made.lead}"
    return replace(
        made,
        title=f"{made.title} (quick run)",
        lead=lead,
        how_chosen={"all": "for speed alone; not tuned"},
        blind=False,
    )
