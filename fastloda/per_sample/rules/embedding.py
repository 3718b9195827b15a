"""The rules of embedding tables: each sample's output gradients are added to the rows that it looked up."""

import torch
from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.tensors import sample_rows

SUM, MEAN, MAX = range(3)  # embedding_bag's modes


def embedding(call: Call) -> dict[int, Recipe]:
    """Make the recipe of embedding(weight [V, D], indices [N, ...]): input 0 weight."""
    node = call.node
    _refuse_counts(node)
    entries = node._saved_weight_sym_argsize_0
    padding = node._saved_padding_idx

    def weight_grad(gy: Tensor, indices: Tensor, samples: int) -> Tensor:
        rows, indices = sample_rows(gy, samples), indices.reshape(samples, -1)
        if 0 <= padding < entries:  # the padding row gets no gradient
            rows = rows * (indices != padding).unsqueeze(-1)
        return _scatter(rows, indices.unsqueeze(-1).expand_as(rows), entries)

    return {0: Recipe(weight_grad, (call.first(call.gy), call.first(node._saved_indices)))}


def embedding_bag(call: Call) -> dict[int, Recipe]:
    """Make the recipe of embedding_bag(weight [V, D], bags of indices): input 0 weight; gy [bags, D] has a row for each bag."""
    node, gy = call.node, call.gy
    _refuse_counts(node)
    entries = node._saved_weight_sym_argsize_0
    if node._saved_mode == MAX:
        return {0: _largest(gy, node._saved_result3, node._saved_result2, entries)}
    indices, weights = _bags(node, len(gy))
    weights = weights.to(torch.promote_types(gy.dtype, torch.float32))

    def weight_grad(gy: Tensor, indices: Tensor, weights: Tensor, samples: int) -> Tensor:
        rows = (sample_rows(gy, samples).unsqueeze(2) * weights.view(samples, len(gy) // samples, -1, 1)).flatten(1, 2)
        return _scatter(rows, indices.reshape(*rows.shape[:2], 1).expand_as(rows), entries)

    return {0: Recipe(weight_grad, (gy, indices, weights), scratch_bytes=4 * indices.numel() * gy.shape[1])}


def _bags(node, bags: int) -> tuple[Tensor, Tensor]:
    """Pad the indices, and the weights with which they count, to [bags, longest bag]; padding has weight 0."""
    flat, starts = node._saved_indices, node._saved_offsets[:bags]
    lengths = torch.diff(starts, append=starts.new_tensor([len(flat)]))
    places = torch.arange(int(lengths.max()) if bags else 0, device=flat.device)
    inside = places < lengths[:, None]
    indices = flat.new_zeros(inside.shape)
    indices[inside] = flat
    counted = inside & (indices != node._saved_padding_idx)
    weights = counted.double()
    if node._saved_per_sample_weights is not None:
        weights[inside] *= node._saved_per_sample_weights.double()
    if node._saved_mode == MEAN:
        weights = weights / counted.sum(1, keepdim=True).clamp(min=1)
    return indices.long(), weights


def _largest(gy: Tensor, largest: Tensor, sizes: Tensor, entries: int) -> Recipe:
    """Make the recipe for mode "max"; largest [bags, D]: the table row that each output came from; sizes [bags] of the bags."""

    def weight_grad(gy: Tensor, largest: Tensor, sizes: Tensor, samples: int) -> Tensor:
        rows = sample_rows(gy, samples) * (sizes > 0).reshape(samples, -1, 1)
        return _scatter(rows, largest.long().clamp(min=0).reshape(rows.shape), entries)

    return Recipe(weight_grad, (gy, largest, sizes))


def _scatter(rows: Tensor, indices: Tensor, entries: int) -> Tensor:
    """Add each number of rows [samples, T, D] to the table row that indices, of the same shape, name: [samples, entries, D]."""
    return rows.new_zeros(len(rows), entries, rows.shape[-1]).scatter_add_(1, indices, rows)


def _refuse_counts(node) -> None:
    if node._saved_scale_grad_by_freq:
        raise PrivacyError("an embedding with scale_grad_by_freq divides by counts over the batch: samples mix")
