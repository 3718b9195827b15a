"""The private step: one backward, norms, clip, sum, noise once, divide by the expected batch size, step.

DP-SGD (Abadi et al. 2016) with book-keeping (Bu et al. 2023). Neighbouring data sets differ by adding or removing one
record. All that a record can change before the noise is the clipped sum, by at most max_grad_norm in L2 norm; with adaptive
clipping a count as well, which is accounted for (`fastloda.adaptive`).
"""

import math
import warnings
import weakref
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastloda.adaptive import AdaptiveClipping
from fastloda.amx import check_convolutions
from fastloda.averaged import check_not_averaged
from fastloda.clip import check_max_grad_norm, clip_factors, group_norms, group_sums
from fastloda.coverage import check_graph, check_independence, check_optimizer, trainable_parameters
from fastloda.distributed import Group, World, check_wrappers, hand_back_shards, parameter_facts, value_facts
from fastloda.flat_sums import FlatSums
from fastloda.functional import cover_modules
from fastloda.graph import trace
from fastloda.members import Members
from fastloda.noise import NoiseOver, NoiseSource, gaussian
from fastloda.pieces import PerSampleGrad, squared_norms
from fastloda.private_loss import look_at_backward
from fastloda.records import per_sample_grads
from fastloda.styles import Clipping, clipping_style
from fastloda.watch import Watch, add_watcher, watch_from_update, watched_since_update

WASTED = 0.95  # of the samples without a finite gradient: the step learned nothing
NOISE_NUMBERS = 1 << 22  # drawn at a time: 32 MiB


@dataclass(frozen=True, repr=False)
class StepStats:
    """Counts over the samples of a step. They are statistics of private data: for the operator, not for release.

    Kept on the device until read, so that a step does not wait for the GPU; `+` joins micro-batches.
    """

    totals: Tensor  # float64 [4]: samples, clipped, nonfinite, sum of the finite samples' losses

    @property
    def samples(self) -> int:
        """Samples that were not masked."""
        return int(self.totals[0])

    @property
    def clipped(self) -> int:
        """Samples whose gradient was longer than its bound; with clipping per layer, in some layer."""
        return int(self.totals[1])

    @property
    def nonfinite(self) -> int:
        """Samples that contributed zero because their gradient was not finite."""
        return int(self.totals[2])

    @classmethod
    def none(cls, device: torch.device) -> "StepStats":
        """Those of no samples."""
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    @property
    def wasted(self) -> bool:
        """Whether nearly no sample had a finite gradient: the step, which is paid for, released noise alone."""
        return self.nonfinite > WASTED * self.samples

    @property
    def clipped_fraction(self) -> float:
        return self.clipped / self.samples if self.samples else 0.0

    @property
    def mean_loss(self) -> float:
        """Mean loss over the samples with a finite gradient; NaN if there is none."""
        finite = self.samples - self.nonfinite
        return float(self.totals[3]) / finite if finite else math.nan

    def __add__(self, other: "StepStats") -> "StepStats":
        return StepStats(self.totals + other.totals)

    def __repr__(self) -> str:
        counts = f"samples={self.samples}, clipped={self.clipped}, nonfinite={self.nonfinite}"
        return f"StepStats({counts}, mean_loss={self.mean_loss:.6g})"


look_at_backward()  # from here on, for a loss may hold a gradient that was made before any clipper


class GhostClipper:
    """The clipped sum of per-sample gradients, over any number of micro-batches, and its noisy mean in `.grad`.

    >>> clipper = GhostClipper(model, max_grad_norm=1.0)
    >>> for x, y in micro_batches:
    ...     clipper.accumulate(loss(model(x), y))          # one number per sample
    >>> clipper.privatize(noise_multiplier=1.0, expected_batch_size=256)
    >>> optimizer.step()

    Guarantees: one sample changes the sum by at most max_grad_norm (1 + 1e-5) in L2 norm, whatever the model puts out; a
    sample whose gradient is not finite contributes zero; the noise is added once, however many micro-batches came.

    Where `torch.distributed` is initialised, all ranks are one step (`fastloda.distributed`): each accumulates its own share of
    the samples, perhaps none, and all call privatize. The noise is added once for all of them, and every rank gets the same
    bits in `.grad`. No record may be on two ranks.

    Args:
        max_grad_norm: the bound on a sample's contribution. With adaptive clipping where it starts; the attribute then moves.
        views: losses per sample, averaged before clipping.
        clipping: "flat", "automatic", "per_layer", "adaptive", or one of them with its settings (`fastloda.clip`, `.adaptive`).
        group: the process group of those ranks. None: the default one, if it is initialised; "alone": this process only.

    Raises:
        ValueError: max_grad_norm is not positive and finite, or views < 1, or clipping is unknown or does not fit the model.
        PrivacyError: nothing trains, or a layer mixes samples, or a wrapper handles gradients by itself (`check_wrappers`).
    """

    def __init__(
        self,
        model: nn.Module,
        max_grad_norm: float,
        views: int = 1,
        *,
        clipping: Clipping = "flat",
        group: Group = None,
    ):
        self.max_grad_norm = check_max_grad_norm(max_grad_norm)
        self.views = _check_views(views)
        self.clipping = clipping_style(clipping)
        self.model = model
        self.group = group
        self._world = World.of(group)
        hand_back_shards(model)
        check_wrappers(model, self.world)
        members = Members.of(model)
        self.parameters = trainable_parameters(members)
        # what has no rule gets the slower one, from the next forward pass on
        cover_modules(members.modules, self.parameters)
        self._watch: Watch | None = Watch(members)  # None from the noise to the end of the update
        add_watcher(model, self)
        self._groups = self.clipping.groups(self.parameters)
        shares = self.clipping.shares(self._groups, self.max_grad_norm)
        device = next(iter(self.parameters.values())).device
        self._shares = torch.tensor(shares, dtype=torch.float64, device=device)[:, None]
        self._adaptive = self.clipping if isinstance(self.clipping, AdaptiveClipping) else None
        if self._adaptive:
            self.max_grad_norm = self._adaptive.initial or self.max_grad_norm
        self.reset()

    @property
    def world(self) -> World:
        """The ranks that make the step together, since the clipper was made. Raises PrivacyError if they have changed."""
        return self._world.unchanged(self.group)

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._sums = FlatSums(self.parameters)  # anew, for the model may have been moved or cast
        self._count = self._shares.new_zeros(())  # of adaptive clipping; private, as the sums are
        self._stats = StepStats.none(self._shares.device)

    def accumulate(self, losses: Tensor, mask: Tensor | None = None) -> StepStats:
        """Add the clipped gradients of a micro-batch. Runs losses' only backward pass and frees its graph.

        Args:
            losses: [samples * views], sample-major: one number per sample and view. A sample's gradient is that of the mean
                over its views.
            mask: bool [samples]; False marks padding, which contributes zero. Default: all true.

        Raises:
            ValueError, PrivacyError: see the message; nothing has changed then.
        """
        samples, mask = _check_losses(losses, self.views, mask)
        self._world.unchanged(self.group)
        sharded = hand_back_shards(self.model)
        self.check_model()
        return self._add(losses, samples, mask, sharded)

    def check_model(self) -> None:
        """Refuse a model that is not the one that the clipper was made for, or that a pass over records has written to.

        Raises:
            ValueError: other parameters train.
            PrivacyError: a parameter or buffer changed.
        """
        members = Members.of(self.model)
        now = trainable_parameters(members)
        if now.keys() != self.parameters.keys() or any(now[name] is not p for name, p in self.parameters.items()):
            raise ValueError("the model's trainable parameters changed since GhostClipper was made: make a new one")
        self._watch = self._watch or Watch(members)  # an update without an optimizer of PyTorch's ends unseen
        self._watch.check(members, thorough=False)  # what counts no write is compared once, before the noise

    def _add(self, losses: Tensor, samples: int, mask: Tensor, sharded: bool) -> StepStats:
        """`accumulate`, for a model that is known to be the one that the clipper was made for."""
        if not samples:  # an empty Poisson batch adds nothing; its noise comes in privatize
            _check_not_sharded(sharded)
            return StepStats.none(losses.device)
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
            world = self.world if sharded else World()
            grads = _per_sample_grads(losses, self.model, self.parameters, samples, world)
            norms, bounds = group_norms(grads, self._groups, samples, losses.device), self._shares * self.max_grad_norm
            factors = clip_factors(norms, bounds, mask, self.clipping)
            self._sums.add_(group_sums(grads, self._groups, factors))
        if self._adaptive:
            self._count += self._adaptive.centred_count(norms[0], self.max_grad_norm, mask)
        stats = _stats(losses, norms, mask, bounds)
        self._stats += stats
        return stats

    def privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: NoiseSource | NoiseOver | None = None
    ) -> None:
        """.grad = (clipped sum + N(0, (noise_multiplier max_grad_norm)^2)) / expected_batch_size; then start anew.

        With adaptive clipping the gradient's noise is larger, by what the step's other release costs, and max_grad_norm moves.

        Args:
            noise_multiplier: noise's standard deviation over max_grad_norm, as accounted; 0 gives no privacy.
            expected_batch_size: sample_rate x records, those of all ranks together. Public: never the realised batch size.
            generator: for experiments that must repeat, or a `SecureGenerator`; read on rank 0 only. A function is called with
                the sums, on all ranks, and gives it. Default: seeded by the operating system.

        Raises:
            ValueError: an argument is out of range, or the ranks disagree on one, on max_grad_norm, on views, or on the
                trainable parameters or their values. All ranks raise, and nothing has changed.
        """
        world = self.world
        if world.size > 1:  # first, for what one rank refuses all must refuse
            world.check_same(self._facts(noise_multiplier, expected_batch_size))
        _check_privatize(noise_multiplier, expected_batch_size)
        if self._watch:
            self._watch.check(Members.of(self.model))  # backward may have written, too
        std = self.clipping.gradient_noise(noise_multiplier, expected_batch_size) * self.max_grad_norm
        sums = world.sum_to_first(self._sums.buffers)
        if callable(generator):
            counts = world.sum_to_first({"count": self._count}) if self._adaptive else {}
            generator = generator([*sums.values(), *counts.values()])
        noise = std if world.first else 0.0
        means = {alike: _noisy_mean(sums[alike], noise, expected_batch_size, alike[1], generator) for alike in sums}
        world.copy_from_first(list(means.values()))
        if self._adaptive:
            step = (self.max_grad_norm, self._count, noise_multiplier, expected_batch_size)
            self.max_grad_norm = self._adaptive.moved_bound(*step, world, generator)
        for name, grad in self._sums.parted(means).items():
            self.parameters[name].grad = grad
        stats = self._stats
        self.reset()
        self._watch = None
        _released.add(self)
        _follow_optimizers()
        _warn_if_wasted(stats)  # last, for it waits for the GPU

    def watch(self) -> None:
        """Take the model as it is now: from here to the noise nothing may change."""
        self._watch = Watch(Members.of(self.model))
        _released.discard(self)

    def _facts(self, noise_multiplier: float, expected_batch_size: float) -> dict[str, object]:
        """What all ranks must agree on."""
        arguments = {
            "max_grad_norm": self.max_grad_norm,
            "views": self.views,
            "clipping": self.clipping,
            "noise_multiplier": noise_multiplier,
            "expected_batch_size": expected_batch_size,
        }
        return arguments | parameter_facts(self.parameters) | value_facts(self.parameters)


def ghost_dp_step(
    losses: Tensor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    views: int = 1,
    mask: Tensor | None = None,
    generator: NoiseSource | None = None,
    clipping: Clipping = "flat",
    group: Group = None,
) -> StepStats:
    """One step of DP-SGD, or of any optimizer on the private gradient; in place of `loss.mean().backward(); optimizer.step()`.

    losses [samples * views] is the model's loss, one number per sample and view. Arguments and errors as in `GhostClipper`;
    every check comes before anything changes. On several ranks the statistics are of this rank's samples. Adaptive clipping
    is refused: its bound goes on from step to step, in a `GhostClipper` that is kept.
    """
    watched_since_update(model, Members.of(model))
    clipper = GhostClipper(model, max_grad_norm, views, clipping=clipping, group=group)
    if isinstance(clipper.clipping, AdaptiveClipping):
        raise ValueError(
            f"clipping={clipping!r} needs one GhostClipper for all steps, which keeps the bound between them"
        )
    check_optimizer(optimizer, clipper.parameters)
    _check_privatize(noise_multiplier, expected_batch_size)
    samples, mask = _check_losses(losses, clipper.views, mask)
    stats = clipper._add(losses, samples, mask, hand_back_shards(model))  # made just now: not to be looked at once more
    clipper.privatize(noise_multiplier, expected_batch_size, generator)
    del clipper  # which would watch the model from here on by itself
    optimizer.step()
    watch_from_update(model)
    return stats


def per_sample_grad_norms(losses: Tensor, model: nn.Module, *, views: int = 1) -> Tensor:
    """L2 norms of the samples' gradients over all trainable parameters: [samples], float64; not finite where a gradient is not.

    Leaves `.grad`, and the graph below losses, as they are. Errors as in `GhostClipper`.
    """
    samples, _ = _check_losses(losses, _check_views(views), None)
    world = World.of() if hand_back_shards(model) else World()
    parameters = trainable_parameters(Members.of(model))
    if not samples:
        _check_not_sharded(world.size > 1)
        return losses.detach().double()
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        grads = _per_sample_grads(losses, model, parameters, samples, world, retain_graph=True)
        return squared_norms(grads.values(), samples, losses.device).sqrt()


def _per_sample_grads(losses, model, parameters, samples, world, retain_graph=False) -> dict[str, PerSampleGrad]:
    """world: of the ranks that must make each backward pass together."""
    graph = trace(losses, parameters, alone=samples == 1)
    check_graph(graph)
    check_not_averaged(losses)
    check_convolutions(dict(model.named_modules()), graph)
    check_independence(losses, graph, model, parameters, samples, world.most)
    return per_sample_grads(losses, graph, parameters, samples, retain_graph)


_released: weakref.WeakSet[GhostClipper] = weakref.WeakSet()  # those whose parameters an optimizer has yet to move


@cache
def _follow_optimizers() -> None:
    """Once in a process: let every clipper watch its model again when an optimizer has moved its parameters."""

    def after_step(optimizer: torch.optim.Optimizer, *_) -> None:
        for clipper in list(_released):
            own = {id(p) for p in clipper.parameters.values()}
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                clipper.watch()

    register_optimizer_step_post_hook(after_step)


def _stats(losses: Tensor, norms: Tensor, mask: Tensor, bounds: Tensor) -> StepStats:
    finite, longer = norms.isfinite().all(0), (norms > bounds).any(0)
    loss = losses.detach().double().view(len(mask), -1).mean(1)
    counts = [mask, mask & finite & longer, mask & ~finite, torch.where(mask & finite, loss, 0.0)]
    return StepStats(torch.stack([count.sum(dtype=torch.float64) for count in counts]))


def _warn_if_wasted(stats: StepStats) -> None:
    if stats.wasted:
        warnings.warn(
            f"{stats.nonfinite} of {stats.samples} samples had a gradient that is not finite and contributed zero: this step "
            "released noise alone, and was paid for. Look for an overflow in the model or the loss (float16?), and for "
            "parameters that are not finite",
            stacklevel=3,
        )


def _noisy_mean(total: Tensor, std: float, count: float, dtype: torch.dtype, generator: NoiseSource | None) -> Tensor:
    """(total [numbers] + N(0, std^2)) / count in `dtype`; with noise computed in float64, a part at a time."""
    if not std:
        return (total / count).to(dtype)
    mean = torch.empty_like(total, dtype=dtype)
    for into, part in zip(mean.split(NOISE_NUMBERS), total.split(NOISE_NUMBERS)):
        into.copy_(gaussian(part.shape, std, part.device, generator).add_(part).div_(count))
    return mean


def _check_views(views: int) -> int:
    if not isinstance(views, int) or isinstance(views, bool) or views < 1:
        raise ValueError(f"views must be an integer >= 1, got {views!r}")
    return views


def _check_losses(losses: Tensor, views: int, mask: Tensor | None) -> tuple[int, Tensor]:
    """-> the number of samples and the mask."""
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = f"a {losses.dtype} tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ValueError(f"losses must be a vector with one number per sample (reduction='none'), got {got}")
    if len(losses) % views:
        raise ValueError(f"{len(losses)} losses are no multiple of views={views}")
    samples = len(losses) // views
    if samples and losses.grad_fn is None:
        raise ValueError(
            "losses has no graph: compute it with gradients enabled, from a model with trainable parameters"
        )
    if mask is None:
        return samples, torch.ones(samples, dtype=torch.bool, device=losses.device)
    if mask.shape != (samples,) or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape ({samples},), got {mask.dtype} of shape {tuple(mask.shape)}")
    return samples, mask.to(losses.device)


def _check_not_sharded(sharded: bool) -> None:
    if sharded:
        raise ValueError(
            "losses is empty, but the model's weights are sharded, so that every rank must make every backward pass: give a rank "
            "that has no sample a masked one"
        )


def _check_privatize(noise_multiplier: float, expected_batch_size: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier!r}")
    if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise ValueError(f"expected_batch_size must be positive and finite, got {expected_batch_size!r}")
