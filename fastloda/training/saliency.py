"""A noisy release of how the records' gradients are spread over the layers, by which the layers to adapt can be chosen.

A record's vector has an entry for each layer, the norm of its gradient there, and is scaled to L2 norm 1:

    v_l = |g_l| / |g|,        released:  sum_n v_n + N(0, noise_multiplier^2)

So a record moves the sum by at most 1, whatever it holds: that is the sensitivity. DP-SAPF clips gradients to a norm C and sums
|g_l|^2, of sensitivity C^2. Here there is no C to guess, and short gradients count as much as long ones, as they do in training
with a small clipping bound. Nor are norms squared, for squares differ too much in size: of the 39 adapters of the digits' U-Net,
half had a sum of squares below the noise (1,437 records, noise 20), and an eighth a sum of norms below it.

The sum is computed by a private step on a linear map with one weight for each layer, whose losses have the vectors as gradients.
So all that `DPTrainer` promises of a step holds for it: records that mix are looked for, owners count once with all records, the
sum is in float64, and all ranks share one noise.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset

from fastloda.errors import UserError
from fastloda.per_sample.compute import check_losses, compute_per_sample_grads, in_full_precision
from fastloda.per_sample.members import Members
from fastloda.privacy.clip import group_norms
from fastloda.privacy.ranks import Group, hand_back_shards, replicate
from fastloda.privacy.step import GhostClipper
from fastloda.privacy.styles import PerLayer
from fastloda.privacy.watch import Watch
from fastloda.training.average import copy_into
from fastloda.training.batches import Columns
from fastloda.training.owners import OwnerIds
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer, Losses


@dataclass(frozen=True)
class Saliency:
    """The result of `release_saliency`: how the records' gradients are spread over the layers.

    Attributes:
        shares: mapping from layer to its entry in the mean of the records' vectors, with noise.
        release: the release as `compose_epsilon` and `PrivateTraining.earlier` take it.
    """

    shares: dict[str, float]
    release: tuple[float, float, int]

    def best(self, share: float) -> list[str]:
        """List that share of the layers, at least one, which have most of the gradients; in the model's order.

        Raises:
            UserError: share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise UserError(f"share must be above 0 and at most 1, got {share!r}")
        ranked = sorted(self.shares, key=lambda layer: -self.shares[layer])
        chosen = ranked[: math.ceil(share * len(ranked) - 1e-9)]  # 0.55 * 100 is a little more than 55
        return [layer for layer in self.shares if layer in chosen]


def release_saliency(
    model: nn.Module,
    data: Columns | Dataset,
    losses: Losses,
    *,
    records: float,
    noise_multiplier: float,
    sample_rate: float = 1.0,
    views: int = 1,
    owners: OwnerIds | None = None,
    per_owner: int = 1,
    micro_batch_size: int = 256,
    seed: int | None = None,
    secure_noise: bool = False,
    group: Group = None,
) -> Saliency:
    """Release, with noise and once, how the records' gradients are spread over the layers of a model.

    A layer is a module with trainable parameters of its own: an adapter after `attach_loda`. The model stays as it is. Every
    call is another release about the records: give `Saliency.release` to the run that follows, among `PrivateTraining.earlier`.

    >>> attach_loda(model)
    >>> found = release_saliency(model, data, losses, records=50_000, noise_multiplier=20.0)
    >>> detach_loda(model, keep=found.best(0.5))
    >>> settings = PrivateTraining(..., target_epsilon=1.0, earlier=(found.release,))

    Args:
        model, data, losses, owners: as in `DPTrainer`. An owner's vector is the mean over `per_owner` records.
        records: the public, nominal number of records, or of owners.
        noise_multiplier: the standard deviation of the noise; the sensitivity is 1.
        sample_rate: the probability with which a record is used. At 1 all are, in one pass; a smaller rate saves time, and with
            noise_multiplier smaller in proportion costs about the same.
        views, per_owner, micro_batch_size, seed, secure_noise: as in `PrivateTraining`.
        group: as in `DPTrainer`.

    Raises:
        ValueError, PrivacyError: as `DPTrainer` and its step; nothing was released then.
    """
    if hand_back_shards(model):
        raise UserError("the model's weights are sharded: release_saliency takes a model as it is before fully_shard")
    replicate(model, group)
    parameters = GhostClipper(model, 1.0, views, group=group).parameters  # refuses what no private step takes
    watch = Watch(Members.of(model))
    groups = PerLayer().groups(parameters)
    device = next(iter(parameters.values())).device
    start = torch.linspace(1, 2, len(groups), dtype=torch.float64)  # all unlike, so that losses show any change
    weights = nn.Linear(len(groups), 1, bias=False, device=device, dtype=torch.float64)
    copy_into({"": weights.get_parameter("weight")}, {"": start})

    def layer_losses(weights: nn.Module, batch: Any, generator: Generator) -> Tensor:
        found = losses(model, batch, generator)
        samples, _ = check_losses(found, views, None)
        with in_full_precision(found.device):
            grads = compute_per_sample_grads(found, model, parameters, samples)
            norms = group_norms(grads, groups, samples, found.device)
        return weights(vectors(norms)).flatten()

    settings = PrivateTraining(
        sample_rate=sample_rate,
        expected_batch_size=sample_rate * records,
        steps=1,
        delta=0.5,  # no epsilon is computed here
        noise_multiplier=noise_multiplier,
        per_owner=per_owner,
        micro_batch_size=micro_batch_size,
        fixed_shape=False,
        optimizer="sgd",
        learning_rate=1.0,
        seed=None if seed is None else -1 - seed,  # another run's noise than that of the training that follows
        secure_noise=secure_noise,
    )
    trainer = DPTrainer(weights, data, layer_losses, settings, owners=owners, progress=False, group=group)
    trainer.train_step()
    watch.check(Members.of(model))
    shares = (start - weights.weight.detach().cpu()[0]).tolist()
    return Saliency(dict(zip(groups, shares)), tuple(trainer.accountant.mechanism(trainer.step)))


def vectors(norms: Tensor) -> Tensor:
    """Compute the samples' vectors [samples, layers], of L2 norm 1, from norms [layers, samples], float64.

    A sample's vector is zero if a norm is not finite, or if all are zero.
    """
    largest = norms.amax(0)
    relative = norms / largest  # whose squares can't all vanish, nor overflow
    usable = norms.isfinite().all(0) & (largest > 0)
    return torch.where(usable, relative / relative.norm(dim=0), 0.0).T
