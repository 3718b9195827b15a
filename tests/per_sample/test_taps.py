"""The taps of a convolution's gradient, compared with their definition at each position."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastloda.per_sample.taps import SHORT_RUN, gather_taps


def by_definition(g: Tensor, in_size: Sequence[int], kernel, stride, padding, dilation) -> Tensor:
    taps = g.new_zeros(*g.shape[:2], *kernel, *in_size)
    for reversed_tap in itertools.product(*map(range, kernel)):
        for q in itertools.product(*map(range, in_size)):
            tap = [k - 1 - reverse for k, reverse in zip(kernel, reversed_tap)]
            at = [divmod(a + p - k * d, s) for a, p, k, d, s in zip(q, padding, tap, dilation, stride)]
            if all(rest == 0 and 0 <= place < size for (place, rest), size in zip(at, g.shape[2:])):
                taps[(..., *reversed_tap, *q)] = g[(..., *(place for place, _ in at))]
    return taps.reshape(len(g), g.shape[1] * torch.Size(kernel).numel(), torch.Size(in_size).numel())


@given(data=st.data(), dims=st.integers(1, 3), batch=st.integers(0, 2), channels=st.sampled_from([1, 3]))
@settings(deadline=None)
def test_taps_are_what_their_definition_says(data, dims, batch, channels):
    sizes = lambda *choices: data.draw(st.tuples(*[st.sampled_from(choices)] * dims))  # noqa: E731
    in_size = sizes(1, 2, 3, 5, SHORT_RUN, SHORT_RUN + 1)
    kernel, stride, padding, dilation = sizes(1, 2, 3, 4), sizes(1, 2, 3), sizes(0, 1, 2, 3), sizes(1, 2)
    room = [q + 2 * p - d * (k - 1) - 1 for q, k, p, d in zip(in_size, kernel, padding, dilation)]
    assume(min(room) >= 0 and torch.Size(in_size).numel() <= 90)
    missing = sizes(0, 0, 1)  # of the positions, as in a transposed convolution with output padding
    g = torch.randn(batch, channels, *(max(1, r // s + 1 - m) for r, s, m in zip(room, stride, missing)))
    geometry = in_size, kernel, stride, padding, dilation
    torch.testing.assert_close(gather_taps(g, *geometry), by_definition(g, *geometry), rtol=0, atol=0)


@pytest.mark.parametrize("size", [SHORT_RUN, SHORT_RUN + 1])
def test_taps_read_any_memory_order(size):
    g = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    geometry = (size, size), (3, 3), (1, 1), (1, 1), (1, 1)
    torch.testing.assert_close(gather_taps(g, *geometry), gather_taps(g.contiguous(), *geometry), rtol=0, atol=0)
