"""Opacus's interface: `make_private` takes an ordinary training loop's model, optimizer and loader and returns private ones.

    model, optimizer, loader = fastloda.make_private(model, optimizer, loader, noise_multiplier=1.1, max_grad_norm=1.0)
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()

The names and their meaning are those of `opacus.PrivacyEngine` (https://opacus.ai/api/privacy_engine.html), so that only its
import changes. The differences serve privacy: all batches are Poisson batches, sampling and noise can't be foreseen unless
generators are given, a sample whose gradient is not finite contributes zero, and a step without a new batch is refused.
"""

import io
import math
import os
import warnings
from collections.abc import Generator as Yielding
from collections.abc import Sequence
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.accounting.calibrate import calibrate_noise
from fastloda.accounting.history import HistoryAccountant
from fastloda.engine.loader import PoissonLoader
from fastloda.engine.module import PrivateHooks, PrivateModule, Tape, bare_module
from fastloda.engine.optimizer import PRIVACY, Budget, PrivateOptimizer
from fastloda.engine.validator import ModuleValidator
from fastloda.errors import PrivacyError, UserError
from fastloda.files import write_atomically
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import check_optimizer, trainable_parameters
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.clip import Clipping
from fastloda.privacy.noise import NoiseSource
from fastloda.privacy.ranks import World, hand_back_shards, replicate
from fastloda.privacy.secure_noise import SecureGenerator
from fastloda.privacy.step import GhostClipper
from fastloda.privacy.styles import PerParameter, check_positive
from fastloda.training.sampling import cyclic_rate

REDUCTIONS = ("mean", "sum")
MODES = ("hooks", "functorch", "ew", "ghost")  # Opacus's modes on one device; here all give the same, exact gradient
OPACUS_ADAPTIVE = {  # Opacus's names of adaptive clipping's settings -> ours
    "target_unclipped_quantile": "quantile",
    "clipbound_learning_rate": "learning_rate",
    "unclipped_num_std": "count_noise",
    "min_clipbound": "min_bound",
    "max_clipbound": "max_bound",
}
Private = tuple[PrivateModule | PrivateHooks, PrivateOptimizer, PoissonLoader]
PrivateGhost = tuple[PrivateModule | PrivateHooks, PrivateOptimizer, Any, PoissonLoader]


class PrivacyEngine:
    """The engine that makes training private, and accounts for all training that it has made private.

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
        max_grad_norm: float | list[float] | tuple[float, ...],
        criterion: Any = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: Clipping = "flat",
        noise_generator: NoiseSource | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        bands: int = 1,
        **unknown: Any,
    ) -> Private | PrivateGhost:
        """Make private counterparts of a training loop's module, optimizer and data loader; the given ones stay as they are.

        Args:
            module: a module with some trainable parameters, each covered by a rule, and the rest frozen; eval mode is allowed.
            optimizer: any first-order optimizer over exactly the trainable parameters (frozen ones may be listed). If it is
                private already, or has loaded a private optimizer's state, the steps accounted there are added to the engine's.
            data_loader: a loader over a map-style data set, with a batch_size. Each step then draws every record with
                probability 1 / len(data_loader). The size of the data set is taken to be public.
            noise_multiplier: standard deviation of the noise on the sum of clipped gradients, divided by max_grad_norm.
            max_grad_norm: the largest L2 norm of what one record contributes; with clipping="per_layer" also a list of bounds,
                one for each of the optimizer's trainable parameters.
            loss_reduction: how the loss reduces the samples' losses: "mean" or "sum". The gradient is the noisy sum of
                clipped gradients, divided by the expected batch size for "mean".
            clipping: "flat", "automatic", "per_layer", "adaptive", or a style with settings (`fastloda.privacy.clip`).
                "adaptive" takes Opacus's settings too, by Opacus's names.
            noise_generator: a generator for experiments that must repeat; the data loader's own generator then draws the
                batches. Without it, neither noise nor batches can be foreseen, however the data loader or torch is seeded. It
                may also be an object whose `normal(shape)` draws the noise (`NormalNumbers`).
            grad_sample_mode: any mode of Opacus for one device; the gradient is the same, and exact. "ghost" makes the return
                value (module, optimizer, criterion, data_loader), with criterion (default: CrossEntropyLoss) unchanged.
            batch_first: False if inputs have the batch second (`fastloda.engine.batch_second`).
            wrap_model: False makes the given module itself private, in place, and returns a `PrivateHooks` instead of a new
                module; its `cleanup()` ends that. It is for code that checks the module's class, as transformers' Trainer does.
            poisson_sampling, rand_on_empty: arguments of Opacus, accepted at their defaults only.
            bands: the number of consecutive steps over which the noise is correlated, so that much of it cancels
                (`privacy/correlated.py`). Each record may then enter only one of these steps, which is drawn at
                random, with `bands` times the probability, and the accountant counts them as one. Every batch of the loader
                must make its step. 1: independent noise.

        The loss must be the mean (or sum) of one loss per sample, each of which depends on its own sample only. A loss that
        visibly does not is refused by `loss.backward()` (`fastloda.engine.loss_check`).

        Where `torch.distributed` is initialised, all ranks call it, with the same data set. They share one Poisson batch per
        step (record i always belongs to rank i mod the number of ranks), take the same noisy step, and each counts it
        once: epsilon is that of one process. The batch_size is that of all ranks together; with a DistributedSampler, each
        rank's. Rank 0's parameters are copied to the others. The loop must take equally many steps on all ranks, and its loss
        is the mean over the rank's own share. A module in DistributedDataParallel is unwrapped; the returned one may be wrapped
        in it again (accelerate does so), which has no effect.

        Raises:
            ValueError, TypeError: an argument can't be honoured; the message says what to do instead.
            PrivacyError: the model or the optimizer would void the guarantee. Nothing has changed in either case.
        """
        world = World.of()
        with _agreed(world) as facts:
            if clipping == "adaptive":
                clipping, unknown = _adaptive_style(unknown)
            _check_opacus_arguments(poisson_sampling, grad_sample_mode, rand_on_empty, unknown)
            if loss_reduction not in REDUCTIONS:
                raise UserError(f"loss_reduction must be one of {REDUCTIONS}, got {loss_reduction!r}")
            module = bare_module(module)
            # `spent` is the account of a private optimizer, or that in a loaded state
            if isinstance(optimizer, PrivateOptimizer):  # the correlated noise stays with it
                optimizer, spent = optimizer.original_optimizer, [{PRIVACY: optimizer.spent()}]
            else:
                spent = optimizer.state_dict()["param_groups"]
            if isinstance(max_grad_norm, (list, tuple)):
                clipping, max_grad_norm = _parameter_bounds(module, optimizer, max_grad_norm, clipping)
            repeatable = isinstance(noise_generator, Generator)
            loader = PoissonLoader.like(data_loader, repeatable=repeatable, ranks=world.size, bands=bands)
            expected_batch_size = loader.sample_rate * loader.batch_sampler.records
            rate = cyclic_rate(loader.sample_rate, bands)
            PrivacyAccountant(rate, noise_multiplier)  # checks both
            if hand_back_shards(module):
                raise PrivacyError(
                    "the module's weights are sharded, so that all ranks must make every backward pass, also without records: "
                    "DPTrainer sees to that; or keep them whole on every rank"
                )
            clipper = GhostClipper(module, max_grad_norm, clipping=clipping)
            clipper.clipping.gradient_noise(noise_multiplier, expected_batch_size)
            check_optimizer(optimizer, clipper.parameters)
            private = PrivateOptimizer(
                optimizer,
                module,
                tape := Tape(loss_reduction),
                loader.tally,
                self.accountant,
                noise_multiplier=noise_multiplier,
                max_grad_norm=clipper.max_grad_norm,
                clipping=clipper.clipping,
                sample_rate=rate,
                expected_batch_size=expected_batch_size,
                run=loader.facts(),
                generator=self._noise_source(noise_generator),
            )
            private.take_in(spent)
            facts |= loader.facts() | {"noise_multiplier": noise_multiplier, "max_grad_norm": private.max_grad_norm}
            facts |= {"clipping": clipper.clipping, "loss_reduction": loss_reduction}
            facts |= {"the private steps taken": len(self.accountant)}
        if world.size > 1:
            loader.batch_sampler.divide(world)
            replicate(module)
        made = PrivateModule(module, tape, batch_first=batch_first)
        made = made if wrap_model else PrivateHooks(made)
        if grad_sample_mode == "ghost":
            return made, private, criterion or nn.CrossEntropyLoss(), loader
        return made, private, loader

    def make_private_with_epsilon(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        *,
        target_epsilon: float,
        target_delta: float,
        epochs: float,
        max_grad_norm: float | list[float] | tuple[float, ...],
        **options: Any,
    ) -> Private | PrivateGhost:
        """Call `make_private` with the least noise for which `epochs` passes cost at most (target_epsilon, target_delta).

        The budget covers the steps of those passes (half a pass for epochs=0.5; with `bands`, rounded up to a multiple of it)
        and no others: the optimizer refuses to take more, and the steps of a loaded state count. If steps have less noise than
        planned (by a schedule), the optimizer refuses the step that would exceed the budget, and each step takes longer, since
        the accountant computes epsilon. Finding the noise takes 1 to 60 s the first time (`calibrate_noise`). Further arguments
        are those of `make_private`.

        Raises:
            ValueError, TypeError, PrivacyError: make_private refuses, or this engine has spent privacy already.
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
        private, bands = made[1], made[1].tally.noise.bands
        rounds = math.ceil(math.ceil(round(epochs * len(made[-1]), 6)) / bands)
        noise = calibrate_noise(target_epsilon, target_delta, private.sample_rate, rounds)
        private.clipping.gradient_noise(noise, private.expected_batch_size)
        private.noise_multiplier = noise
        private.budget = Budget(target_epsilon, target_delta, noise, private.sample_rate, rounds * bands, bands)
        return made

    def get_epsilon(self, delta: float, **settings: Any) -> float:
        """Compute an upper bound on the epsilon spent so far, for adding or removing a record (see `HistoryAccountant`)."""
        return self.accountant.get_epsilon(delta, **settings)

    def is_compatible(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Tell whether `validate` finds nothing."""
        try:
            self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except (PrivacyError, ValueError, TypeError):
            return False
        return True

    def validate(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raise the error that make_private would raise; only the first step can find a trainable layer without a rule."""
        parameters = trainable_parameters(Members.of(module))
        if optimizer is not None:
            check_optimizer(optimizer, parameters)
        if data_loader is not None:
            PoissonLoader.like(data_loader, ranks=World.of().size)

    @staticmethod
    def get_compatible_module(module: nn.Module) -> nn.Module:
        """Copy a module and replace its layers that mix samples (`ModuleValidator.fix`); optimize the parameters of the copy.

        Raises:
            PrivacyError, ValueError: a layer has no replacement.
        """
        return ModuleValidator.fix_and_validate(module)

    def save_checkpoint(
        self,
        *,
        path: str | os.PathLike | IO[bytes],
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write module, optimizer, schedulers (`schedulers.py`) and account into one file, atomically, in Opacus's form.

        The states of random generators are not in it: a resumed run draws other numbers. Raises OSError.
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
        path: str | os.PathLike | IO[bytes],
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load a file of `save_checkpoint` into what make_private returned, and add its account to this engine's.

        The file can't run code (weights_only). An optimizer or scheduler whose state it lacks stays as it is, with a warning.
        Returns the file's contents.
        """
        document = torch.load(path, weights_only=True, **(torch_load_kwargs or {}))
        if absent := {"module_state_dict", "privacy_accountant_state_dict"} - set(document):
            raise UserError(f"{path} lacks {sorted(absent)}")
        account = document["privacy_accountant_state_dict"]
        HistoryAccountant().load_state_dict(account)  # before anything changes: it refuses a malformed account
        schedulers = {"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        given = {name: value for name, value in (schedulers | {"optimizer": optimizer}).items() if value is not None}
        with _as_before_if_it_fails(module, *given.values()):
            module.load_state_dict(document["module_state_dict"], **(module_load_dict_kwargs or {}))
            for name, value in given.items():
                state = document.get(f"{name}_state_dict")
                if state is None:
                    warnings.warn(f"{path} has no {name}_state_dict: the {name} stays as it is", stacklevel=2)
                elif name == "optimizer" and not any(PRIVACY in group for group in state["param_groups"]):
                    # a state of Opacus, whose account is loaded below
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
            raise UserError("noise_generator and secure_mode=True exclude each other: secure noise can't be seeded")
        return SecureGenerator()


@contextmanager
def _agreed(world: World) -> Yielding[dict[str, object]]:
    """Let all ranks fail if one of them fails in the context, or if they put different facts into the yielded dict."""
    facts: dict[str, object] = {}
    try:
        yield facts
    except Exception as error:
        world.tell_failure(error)
        raise
    world.check_same(facts)


@contextmanager
def _as_before_if_it_fails(module: nn.Module, *others: Any) -> Yielding[None]:
    """Restore the states of `module` and `others` if an error leaves the context."""
    before = [(module, {name: t.clone() if isinstance(t, Tensor) else t for name, t in module.state_dict().items()})]
    before += [(other, other.state_dict()) for other in others]
    unused = [other.tally.noise for other in others if hasattr(other, "tally") and not other.tally.noise.steps]
    try:
        yield
    except BaseException:
        for holder, state in before:
            holder.load_state_dict(state)
        for noise in unused:
            noise.forget()  # an optimizer with steps has kept its own noise
        raise


def make_private(
    module: nn.Module, optimizer: torch.optim.Optimizer, data_loader: DataLoader, **options: Any
) -> Private | PrivateGhost:
    """Call `PrivacyEngine().make_private`; the returned optimizer's `epsilon(delta)` computes what has been spent."""
    return PrivacyEngine().make_private(module, optimizer, data_loader, **options)


def make_private_with_epsilon(
    module: nn.Module, optimizer: torch.optim.Optimizer, data_loader: DataLoader, **options: Any
) -> Private | PrivateGhost:
    """Call `PrivacyEngine().make_private_with_epsilon`; see there."""
    return PrivacyEngine().make_private_with_epsilon(module, optimizer, data_loader, **options)


def _check_opacus_arguments(poisson_sampling, grad_sample_mode, rand_on_empty, unknown) -> None:
    """Refuse arguments of Opacus that would mean something else here, and say what to do instead."""
    if not poisson_sampling:
        raise UserError(
            "poisson_sampling=False is refused: for shuffled batches the reported epsilon does not hold; leave it out"
        )
    if grad_sample_mode not in MODES:
        raise UserError(
            f"grad_sample_mode must be one of {MODES} (all give the same gradient), got {grad_sample_mode!r}"
        )
    if rand_on_empty:
        raise UserError("rand_on_empty=True is refused: the private module handles empty batches; leave it out")
    if unknown:
        raise TypeError(
            f"make_private does not know {sorted(unknown)}: leave out orders and errors, which the accountant chooses, and give "
            "clipping's settings in its style (fastloda.privacy.clip, fastloda.privacy.adaptive)"
        )


def _adaptive_style(options: dict[str, Any]) -> tuple[AdaptiveClipping, dict[str, Any]]:
    """Split `options` into the style made from Opacus's settings of adaptive clipping, and the other options."""
    given = {name: options[name] for name in OPACUS_ADAPTIVE.keys() & options.keys()}
    style = AdaptiveClipping(**{OPACUS_ADAPTIVE[name]: value for name, value in given.items()})
    return style, {name: value for name, value in options.items() if name not in given}


def _parameter_bounds(
    module: nn.Module, optimizer: torch.optim.Optimizer, bounds: Sequence[float], clipping: Clipping
) -> tuple[PerParameter, float]:
    """Make the style that clips each trainable parameter to its own one of `bounds`; also return the whole gradient's bound."""
    if clipping != "per_layer":
        raise UserError(
            f"max_grad_norm={bounds!r}, a bound for each parameter, needs clipping='per_layer', got {clipping!r}"
        )
    names = {id(p): name for name, p in module.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if len(trained) != len(bounds):
        raise UserError(f"max_grad_norm has {len(bounds)} bounds for {len(trained)} trainable parameters")
    by_name = {names.get(id(p), "?"): bound for p, bound in zip(trained, bounds)}
    return PerParameter(by_name), math.hypot(*by_name.values())
