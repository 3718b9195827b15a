"""A cross entropy with class weights and ignored targets, in which no sample's loss depends on the other samples."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """The `torch.nn.CrossEntropyLoss` with another divisor: it is the mean over the batch of each sample's own loss.

    PyTorch divides by the sum of the weights of the batch's targets, or by how many of them are not ignored, so that one record
    scales the losses of all others. Here the loss of sample n is

        l_n = sum_j w[y_nj] ce_nj / (number of its own targets that are not ignored)        j over its positions

    and 0 if all its targets are ignored; weights are not normalised. Without weights and ignored targets it equals PyTorch's.
    Where tokens are flattened to rows, [samples * positions, classes], each row is a sample: the loss of an ignored one is 0,
    and is counted in the mean.

    Args:
        reduction: "mean" or "sum" over the samples, or "none" for the samples' own losses, [samples].
        weight, ignore_index, label_smoothing: the arguments of PyTorch's loss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if losses.dim() > 1:
            labels = target.dim() < input.dim()  # otherwise the targets are probabilities of the classes
            counted = target != self.ignore_index if labels else torch.ones_like(losses, dtype=torch.bool)
            losses = losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
        return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[self.reduction]
