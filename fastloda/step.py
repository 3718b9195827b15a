"""The private step: one backward, norms, clip, sum, noise once, divide by the expected batch size, step.

DP-SGD (Abadi et al. 2016) with book-keeping (Bu et al. 2023). Neighbouring data sets differ by adding or removing one
record. All that a record can change before the noise is the clipped sum, by at most max_grad_norm in L2 norm.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from fastloda.clip import check_max_grad_norm, clip_factors, clipped_sums
from fastloda.coverage import FrozenWatch, check_graph, check_independence, check_optimizer, trainable_parameters
from fastloda.graph import trace
from fastloda.noise import gaussian
from fastloda.pieces import PerSampleGrad, squared_norms
from fastloda.records import per_sample_grads


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
        """Samples whose gradient was longer than max_grad_norm."""
        return int(self.totals[1])

    @property
    def nonfinite(self) -> int:
        """Samples that contributed zero because their gradient was not finite."""
        return int(self.totals[2])

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


class GhostClipper:
    """The clipped sum of per-sample gradients, over any number of micro-batches, and its noisy mean in `.grad`.

    >>> clipper = GhostClipper(model, max_grad_norm=1.0)
    >>> for x, y in micro_batches:
    ...     clipper.accumulate(loss(model(x), y))          # one number per sample
    >>> clipper.privatize(noise_multiplier=1.0, expected_batch_size=256)
    >>> optimizer.step()

    Guarantees: one sample changes the sum by at most max_grad_norm (1 + 1e-5) in L2 norm, whatever the model puts out; a
    sample whose gradient is not finite contributes zero; the noise is added once, however many micro-batches came.

    Raises:
        ValueError: max_grad_norm is not positive and finite, or views < 1.
        PrivacyError: nothing trains, or a layer mixes samples.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float, views: int = 1):
        self.max_grad_norm = check_max_grad_norm(max_grad_norm)
        self.views = _check_views(views)
        self.model = model
        self.parameters = trainable_parameters(model)
        self._frozen = FrozenWatch(model)
        self.reset()

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._sums = {name: _zeros_to_accumulate(p) for name, p in self.parameters.items()}

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
        now = trainable_parameters(self.model)
        if now.keys() != self.parameters.keys() or any(now[name] is not p for name, p in self.parameters.items()):
            raise ValueError("the model's trainable parameters changed since GhostClipper was made: make a new one")
        self._frozen.check()
        if not samples:  # an empty Poisson batch adds nothing; its noise comes in privatize
            return StepStats(torch.zeros(4, dtype=torch.float64))
        with torch.autocast(losses.device.type, enabled=False):
            grads = _per_sample_grads(losses, self.model, self.parameters, samples)
            norms = squared_norms(grads.values(), samples, losses.device).sqrt()
            factors = clip_factors(norms, self.max_grad_norm, mask)
            sums = clipped_sums(grads, factors)
        for name, part in sums.items():
            if part is not None:
                self._sums[name] += part
        return _stats(losses, norms, mask, self.max_grad_norm)

    def privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: Generator | None = None
    ) -> None:
        """.grad = (clipped sum + N(0, (noise_multiplier max_grad_norm)^2)) / expected_batch_size; then start anew.

        Args:
            noise_multiplier: noise's standard deviation over max_grad_norm; 0 gives no privacy.
            expected_batch_size: sample_rate x records. Public: never the realised batch size.
            generator: for experiments that must repeat. Default: seeded by the operating system.
        """
        _check_privatize(noise_multiplier, expected_batch_size)
        std = noise_multiplier * self.max_grad_norm
        grads = {}
        for name, total in self._sums.items():
            if std > 0:
                total = total.double() + gaussian(total.shape, std, total.device, generator)
            grads[name] = (total / expected_batch_size).to(self.parameters[name].dtype)
        for name, grad in grads.items():
            self.parameters[name].grad = grad
        self.reset()


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
    generator: Generator | None = None,
) -> StepStats:
    """One step of DP-SGD, or of any optimizer on the private gradient; in place of `loss.mean().backward(); optimizer.step()`.

    losses [samples * views] is the model's loss, one number per sample and view. Arguments and errors as in `GhostClipper`;
    every check comes before anything changes.
    """
    clipper = GhostClipper(model, max_grad_norm, views)
    check_optimizer(optimizer, clipper.parameters)
    _check_privatize(noise_multiplier, expected_batch_size)
    stats = clipper.accumulate(losses, mask)
    clipper.privatize(noise_multiplier, expected_batch_size, generator)
    optimizer.step()
    return stats


def per_sample_grad_norms(losses: Tensor, model: nn.Module, *, views: int = 1) -> Tensor:
    """L2 norms of the samples' gradients over all trainable parameters: [samples], float64; not finite where a gradient is not.

    Leaves `.grad`, and the graph below losses, as they are. Errors as in `GhostClipper`.
    """
    samples, _ = _check_losses(losses, _check_views(views), None)
    parameters = trainable_parameters(model)
    if not samples:
        return losses.detach().double()
    with torch.autocast(losses.device.type, enabled=False):
        grads = _per_sample_grads(losses, model, parameters, samples, retain_graph=True)
        return squared_norms(grads.values(), samples, losses.device).sqrt()


def _per_sample_grads(losses, model, parameters, samples, retain_graph=False) -> dict[str, PerSampleGrad]:
    graph = trace(losses, parameters)
    check_graph(graph)
    check_independence(losses, graph, model, parameters, samples)
    return per_sample_grads(losses, graph, parameters, samples, retain_graph)


def _stats(losses: Tensor, norms: Tensor, mask: Tensor, max_grad_norm: float) -> StepStats:
    finite = norms.isfinite()
    loss = losses.detach().double().view(len(norms), -1).mean(1)
    counts = [mask, mask & finite & (norms > max_grad_norm), mask & ~finite, torch.where(mask & finite, loss, 0.0)]
    return StepStats(torch.stack([count.sum(dtype=torch.float64) for count in counts]))


def _zeros_to_accumulate(parameter: nn.Parameter) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


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


def _check_privatize(noise_multiplier: float, expected_batch_size: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier!r}")
    if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise ValueError(f"expected_batch_size must be positive and finite, got {expected_batch_size!r}")
