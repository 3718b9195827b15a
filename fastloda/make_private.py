"""Opacus's front door: `make_private` takes an ordinary training loop's three objects and returns private ones.

    model, optimizer, loader = fastloda.make_private(model, optimizer, loader, noise_multiplier=1.1, max_grad_norm=1.0)
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()

The names and their meaning are those of `opacus.PrivacyEngine` (https://opacus.ai/api/privacy_engine.html), so that its import
is all that changes. What differs, differs for privacy: batches are Poisson batches and no others, the sampling and the noise
can't be foreseen unless generators are given, a sample that is not finite contributes zero, and a step without a batch of its
own is refused.
"""

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from fastloda.accountant import PrivacyAccountant, calibrate_noise
from fastloda.adaptive import AdaptiveClipping
from fastloda.clip import PerParameter, check_positive
from fastloda.coverage import check_optimizer, trainable_parameters
from fastloda.distributed import World
from fastloda.errors import PrivacyError
from fastloda.files import write_atomically
from fastloda.members import Members
from fastloda.module_validator import ModuleValidator
from fastloda.noise import NoiseSource
from fastloda.private_accountant import HistoryAccountant
from fastloda.private_loader import PoissonLoader
from fastloda.private_module import PrivateModule, Tape
from fastloda.private_optimizer import PRIVACY, Budget, PrivateOptimizer
from fastloda.secure import SecureGenerator
from fastloda.step import GhostClipper
from fastloda.styles import Clipping

REDUCTIONS = ("mean", "sum")
MODES = ("hooks", "functorch", "ew", "ghost")  # of Opacus on one device: for us one and the same, exact gradient
OPACUS_ADAPTIVE = {  # its settings of adaptive clipping -> ours
    "target_unclipped_quantile": "quantile",
    "clipbound_learning_rate": "learning_rate",
    "unclipped_num_std": "count_noise",
    "min_clipbound": "min_bound",
    "max_clipbound": "max_bound",
}
Private = tuple[PrivateModule, PrivateOptimizer, PoissonLoader]
PrivateGhost = tuple[PrivateModule, PrivateOptimizer, Any, PoissonLoader]


class PrivacyEngine:
    """Makes training private, and keeps the account of what it spends, over all that it has made private.

    Args:
        accountant: "prv", or "rdp" (looser). "gdp" is refused: it can lie below the true epsilon.
        secure_mode: draw the noise from the operating system's cryptographically secure generator (`SecureGenerator`).
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False):
        self.accountant = HistoryAccountant(accountant)
        self.secure_mode = secure_mode

    def make_private(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        *,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        criterion: Any = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: Clipping = "flat",
        noise_generator: NoiseSource | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **unknown: Any,
    ) -> Private | PrivateGhost:
        """Private counterparts of a training loop's module, optimizer and data loader; the three given ones stay as they are.

        Args:
            module: with some trainable parameters, each covered by a rule; the rest frozen. It may be in eval mode.
            optimizer: any first-order one over exactly the trainable parameters (frozen ones may be listed). What a private
                optimizer has spent, or one whose state was loaded, is added to the account.
            data_loader: over a map-style data set, with a batch_size. Each step then draws every record with probability
                1 / len(data_loader). The size of the data set is taken to be public.
            noise_multiplier: the noise's standard deviation on the sum of clipped gradients, over max_grad_norm.
            max_grad_norm: the largest L2 norm of what one record contributes; with clipping="per_layer" also a list of bounds,
                one for each of the optimizer's trainable parameters.
            loss_reduction: "mean" or "sum": what the loss is of the samples' own losses. The gradient is the noisy sum of
                clipped gradients, for "mean" over the expected batch size.
            clipping: "flat", "automatic", "per_layer", "adaptive", or a style with settings (`fastloda.clip`). "adaptive" takes
                Opacus's settings too, by Opacus's names.
            noise_generator: for experiments that must repeat; the data loader's own generator then draws the batches, too.
                Without it, neither can be foreseen, however the data loader or torch is seeded. Or an object of one's own whose
                `normal(shape)` gives the noise (`NormalNumbers`).
            grad_sample_mode: any of Opacus's for one device; the gradient is the same, and exact. "ghost" makes the return
                value (module, optimizer, criterion, data_loader), with criterion (default: CrossEntropyLoss) as it is.
            batch_first: False if inputs have the batch second (`fastloda.batch_second`).
            poisson_sampling, wrap_model, rand_on_empty: of Opacus, at their defaults only.

        The loss must be the mean (or sum) of one loss per sample, each of which depends on its own sample only. A loss that
        visibly does not is refused by `loss.backward()` (`fastloda.private_loss`).

        Raises:
            ValueError, TypeError: an argument that can't be honoured, and what to do instead.
            PrivacyError: a model or an optimizer that would void the guarantee. Nothing has changed in either case.
        """
        if clipping == "adaptive":
            clipping, unknown = _adaptive_style(unknown)
        _check_opacus_arguments(poisson_sampling, grad_sample_mode, wrap_model, rand_on_empty, unknown)
        if loss_reduction not in REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {REDUCTIONS}, got {loss_reduction!r}")
        if World.of().size > 1:
            raise PrivacyError("make_private is for one process; DPTrainer trains on several ranks")
        module = module._module if isinstance(module, PrivateModule) else module
        spent = optimizer.state_dict()["param_groups"]  # by a private optimizer, or one whose state was loaded
        optimizer = optimizer.original_optimizer if isinstance(optimizer, PrivateOptimizer) else optimizer
        if isinstance(max_grad_norm, (list, tuple)):
            clipping, max_grad_norm = _parameter_bounds(module, optimizer, max_grad_norm, clipping)
        loader = PoissonLoader.like(data_loader, repeatable=isinstance(noise_generator, Generator))
        expected_batch_size = loader.sample_rate * len(loader.dataset)
        PrivacyAccountant(loader.sample_rate, noise_multiplier)  # checks both
        clipper = GhostClipper(module, max_grad_norm, clipping=clipping)
        clipper.clipping.gradient_noise(noise_multiplier, expected_batch_size)
        check_optimizer(optimizer, clipper.parameters)

        tape = Tape(loss_reduction)
        private = PrivateOptimizer(
            optimizer,
            module,
            tape,
            loader.tally,
            self.accountant,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipper.max_grad_norm,
            clipping=clipper.clipping,
            sample_rate=loader.sample_rate,
            expected_batch_size=expected_batch_size,
            generator=self._noise_source(noise_generator),
        )
        private.take_in(spent)
        module = PrivateModule(module, tape, batch_first=batch_first)
        if grad_sample_mode == "ghost":
            return module, private, criterion or nn.CrossEntropyLoss(), loader
        return module, private, loader

    def make_private_with_epsilon(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        *,
        target_epsilon: float,
        target_delta: float,
        epochs: float,
        max_grad_norm: float | Sequence[float],
        **options: Any,
    ) -> Private | PrivateGhost:
        """`make_private` with the least noise for which `epochs` passes cost at most (target_epsilon, target_delta).

        The steps of those passes, half a pass for epochs=0.5, are all that the budget pays for: the optimizer refuses to take
        another, and counts those that a loaded state brings. If steps have less noise than planned (a schedule), the run ends
        before the budget is exceeded, and each step waits for the accountant. Finding the noise takes 1 to 60 s the first time
        (`calibrate_noise`). Further arguments as for `make_private`.

        Raises:
            ValueError, TypeError, PrivacyError: as make_private; and if this engine has spent privacy already.
        """
        if len(self.accountant):
            raise PrivacyError(
                f"this engine has taken {len(self.accountant)} private steps, so that the whole would cost more than "
                f"target_epsilon={target_epsilon}: make a new PrivacyEngine, and see compose_epsilon for what both cost together"
            )
        check_positive("epochs", epochs)
        # everything but the noise is checked before the search for it
        made = self.make_private(
            module, optimizer, data_loader, noise_multiplier=1.0, max_grad_norm=max_grad_norm, **options
        )
        private, steps = made[1], math.ceil(round(epochs * len(made[-1]), 6))
        noise = calibrate_noise(target_epsilon, target_delta, private.sample_rate, steps)
        private.clipping.gradient_noise(noise, private.expected_batch_size)
        private.noise_multiplier = noise
        private.budget = Budget(target_epsilon, target_delta, noise, private.sample_rate, steps)
        return made

    def get_epsilon(self, delta: float, **settings: Any) -> float:
        """What has been spent so far: an upper bound, for adding or removing one record (`HistoryAccountant.get_epsilon`)."""
        return self.accountant.get_epsilon(delta, **settings)

    def is_compatible(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Whether `validate` finds nothing."""
        try:
            self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except (PrivacyError, ValueError, TypeError):
            return False
        return True

    def validate(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raise what make_private would; a trainable layer without a rule shows at the first step only."""
        parameters = trainable_parameters(Members.of(module))
        if optimizer is not None:
            check_optimizer(optimizer, parameters)
        if data_loader is not None:
            PoissonLoader.like(data_loader)

    @staticmethod
    def get_compatible_module(module: nn.Module) -> nn.Module:
        """A copy whose layers don't mix samples (`ModuleValidator.fix`); the optimizer must be made of the copy's parameters.

        Raises:
            PrivacyError, ValueError: a layer for which there is no replacement.
        """
        return ModuleValidator.fix_and_validate(module)

    def save_checkpoint(
        self,
        *,
        path: str | os.PathLike | io.IOBase,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write module, optimizer, schedulers (`fastloda.schedulers`) and account into one file, atomically, in Opacus's form.

        The random generators are not in it: a resumed run draws anew. Raises OSError.
        """
        document = dict(checkpoint_dict or {})
        document["module_state_dict"] = module.state_dict(**(module_state_dict_kwargs or {}))
        document["privacy_accountant_state_dict"] = self.accountant.state_dict()
        if optimizer is not None:
            document["optimizer_state_dict"] = optimizer.state_dict()
        for name, scheduler in {"noise": noise_scheduler, "grad_clip": grad_clip_scheduler}.items():
            if scheduler is not None:
                document[f"{name}_scheduler_state_dict"] = scheduler.state_dict()
        content = io.BytesIO()
        torch.save(document, content, **(torch_save_kwargs or {}))
        if isinstance(path, (str, os.PathLike)):
            write_atomically(path, content.getvalue())
        else:
            path.write(content.getvalue())

    def load_checkpoint(
        self,
        *,
        path: str | os.PathLike | io.IOBase,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Undo `save_checkpoint`, into what make_private returned. The account is added to: what was spent stays spent.

        The file can't run code (weights_only). What it lacks stays as it is, with a warning. Returns what it holds besides.
        Raises ValueError, RuntimeError, OSError; the account, module and optimizer are then as they were.
        """
        document = torch.load(path, weights_only=True, **(torch_load_kwargs or {}))
        if absent := {"module_state_dict", "privacy_accountant_state_dict"} - set(document):
            raise ValueError(f"{path} lacks {sorted(absent)}")
        account = document["privacy_accountant_state_dict"]
        HistoryAccountant().load_state_dict(account)  # first: it refuses a malformed one
        schedulers = {"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        given = {name: value for name, value in (schedulers | {"optimizer": optimizer}).items() if value is not None}
        with _as_before_if_it_fails(module, *given.values()):
            module.load_state_dict(document["module_state_dict"], **(module_load_dict_kwargs or {}))
            for name, value in given.items():
                state = document.get(f"{name}_state_dict")
                if state is None:
                    warnings.warn(f"{path} has no {name}_state_dict: the {name} stays as it is", stacklevel=2)
                elif name == "optimizer" and not any(PRIVACY in group for group in state["param_groups"]):
                    # Opacus's, whose account is loaded below
                    getattr(value, "original_optimizer", value).load_state_dict(state)
                else:
                    value.load_state_dict(state)
        self.accountant.load_state_dict(account)
        return document

    def _noise_source(self, generator: NoiseSource | None) -> NoiseSource | None:
        if not (generator is None or isinstance(generator, Generator) or hasattr(generator, "normal")):
            raise TypeError(
                f"noise_generator must be a torch.Generator, or have normal(shape), got {type(generator).__name__}"
            )
        if not self.secure_mode:
            return generator
        if generator is not None:
            raise ValueError("noise_generator and secure_mode=True exclude each other: secure noise can't be seeded")
        return SecureGenerator()


@contextmanager
def _as_before_if_it_fails(module: nn.Module, *others: Any) -> Iterator[None]:
    """Give all of them their states back where loading others fails halfway."""
    before = [(module, {name: t.clone() if isinstance(t, Tensor) else t for name, t in module.state_dict().items()})]
    before += [(other, other.state_dict()) for other in others]
    try:
        yield
    except BaseException:
        for holder, state in before:
            holder.load_state_dict(state)
        raise


def make_private(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader,
    *,
    noise_multiplier: float,
    max_grad_norm: float | Sequence[float],
    **options: Any,
) -> Private | PrivateGhost:
    """`PrivacyEngine().make_private`; the returned optimizer's `epsilon(delta)` tells what has been spent."""
    return PrivacyEngine().make_private(
        module, optimizer, data_loader, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, **options
    )


def make_private_with_epsilon(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader,
    *,
    target_epsilon: float,
    target_delta: float,
    epochs: float,
    max_grad_norm: float | Sequence[float],
    **options: Any,
) -> Private | PrivateGhost:
    """`PrivacyEngine().make_private_with_epsilon`; see there."""
    budget = {"target_epsilon": target_epsilon, "target_delta": target_delta, "epochs": epochs}
    return PrivacyEngine().make_private_with_epsilon(
        module, optimizer, data_loader, **budget, max_grad_norm=max_grad_norm, **options
    )


def _check_opacus_arguments(poisson_sampling, grad_sample_mode, wrap_model, rand_on_empty, unknown) -> None:
    """Refuse arguments of Opacus that would mean something else here, and say what to do."""
    if not poisson_sampling:
        raise ValueError(
            "poisson_sampling=False is refused: for shuffled batches the reported epsilon does not hold; leave it out"
        )
    if grad_sample_mode not in MODES:
        raise ValueError(
            f"grad_sample_mode must be one of {MODES} (all give the same gradient), got {grad_sample_mode!r}"
        )
    if not wrap_model:
        raise ValueError(
            "wrap_model=False is refused: train the module that is returned. It shares the parameters with yours, which is its "
            "to_standard_module() and can be saved or used for inference as it is"
        )
    if rand_on_empty:
        raise ValueError("rand_on_empty=True is refused: the private module handles empty batches; leave it out")
    if unknown:
        raise TypeError(
            f"make_private does not know {sorted(unknown)}: leave out orders and errors, which the accountant chooses, and give "
            "clipping's settings in its style (fastloda.clip, fastloda.adaptive)"
        )


def _adaptive_style(options: dict[str, Any]) -> tuple[AdaptiveClipping, dict[str, Any]]:
    """-> the style that Opacus's settings make, and the other options."""
    given = {name: options[name] for name in OPACUS_ADAPTIVE.keys() & options.keys()}
    style = AdaptiveClipping(**{OPACUS_ADAPTIVE[name]: value for name, value in given.items()})
    return style, {name: value for name, value in options.items() if name not in given}


def _parameter_bounds(
    module: nn.Module, optimizer: torch.optim.Optimizer, bounds: Sequence[float], clipping: Clipping
) -> tuple[PerParameter, float]:
    """-> the style, and the bound on the whole gradient."""
    if clipping != "per_layer":
        raise ValueError(
            f"max_grad_norm={bounds!r}, a bound for each parameter, needs clipping='per_layer', got {clipping!r}"
        )
    names = {id(p): name for name, p in module.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if len(trained) != len(bounds):
        raise ValueError(f"max_grad_norm has {len(bounds)} bounds for {len(trained)} trainable parameters")
    style = PerParameter({names.get(id(p), "?"): bound for p, bound in zip(trained, bounds)})
    return style, math.hypot(*style.bounds.values())
