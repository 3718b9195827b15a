"""The table of operations says about dimensions and indices what PyTorch's own backward passes do."""

import re

import pytest
import torch

from fastloda.per_sample import operations

SHAPE = (2, 3, 5)
MOVING = {
    "permute": lambda x: x.permute(2, 0, -2),
    "transpose": lambda x: x.transpose(-1, 0),
    "t": lambda x: x[0].t(),
    "select": lambda x: x.select(-2, -1),
    "unbind": lambda x: x.unbind(1)[2],
    "stack": lambda x: torch.stack([x, x], -2),
    "sum of a dimension": lambda x: x.sum(1),
    "mean of two": lambda x: x.mean((0, -1)),
    "norm, kept": lambda x: x.norm(dim=1, keepdim=True),
    "maximum": lambda x: x.amax(-1),
    "softmax": lambda x: x.softmax(1),
    "broadcast": lambda x: x + torch.zeros(4, 2, 3, 5),
    "expand": lambda x: x[:, None, 0, :1].expand(2, 4, 7),
    "slice": lambda x: x[:, :, 1:4],
}
TAKING = {
    "select": lambda x: x.select(1, -1),
    "slice": lambda x: x[:, :, -4:-1],
    "slice with a step": lambda x: x[:, :, 1::2],
    "slice to the end": lambda x: x[:, 1:],
    "split": lambda x: x.split(2, -1)[1],
    "split with sizes": lambda x: x.split([1, 3, 1], 2)[1],
    "unbind": lambda x: x.unbind(2)[3],
}
PICKS = {
    "one index": lambda x: x[:, torch.tensor([2, 0, 1, 1])],
    "neighbours": lambda x: x[:, torch.tensor([[0], [2]]), torch.tensor([4, 1, 3])],
    "apart": lambda x: x[torch.tensor([1, 0]), :, torch.tensor([4, 2])],
    "mask": lambda x: x[:, torch.tensor([True, False, True])],
    "mask of two": lambda x: x[torch.eye(2, 3).bool()],
    "index_select": lambda x: x.index_select(-1, torch.tensor([4, 4, 0])),
}


def known_kinds():
    return {found[1] for name in dir(torch._C._functions) if (found := re.fullmatch(r"(\w+)Backward\d+", name))}


def test_every_kind_is_pytorchs():
    tables = [table for name, table in vars(operations).items() if name.isupper() and isinstance(table, frozenset)]
    named = set().union(operations.PRODUCTS, *tables)
    assert len(named) > 100
    assert named - known_kinds() == set()


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_a_function_does_not_pass_for_the_operation_whose_name_it_has():
    x = torch.randn(3, requires_grad=True)
    own, real = Gelu.apply(x).grad_fn, torch.nn.functional.gelu(x).grad_fn
    assert operations.kind_of(real) == "Gelu" != operations.kind_of(own)
    assert operations.is_pointwise(real) and not operations.is_pointwise(own)


def indices_reached(function, dim_out, entry):
    """Find the indices along each input dimension from which entry `entry` of the output's dimension `dim_out` is made."""
    x = torch.rand(SHAPE, requires_grad=True)
    y = function(x)
    node, number = y.grad_fn, y.output_nr
    edge = torch.autograd.graph.GradientEdge(*node.next_functions[0])
    gy = torch.zeros_like(y)
    gy.select(dim_out, entry).fill_(1)
    (gx,) = torch.autograd.grad([torch.autograd.graph.GradientEdge(node, number)], [edge], [gy])
    return [set(gx.movedim(d, 0).flatten(1).abs().sum(1).nonzero().flatten().tolist()) for d in range(gx.dim())]


def read(function):
    """Return an operation's graph node, its output's number, and the shapes of its input and output."""
    y = function(torch.rand(SHAPE, requires_grad=True))
    below, number = y.grad_fn.next_functions[0]
    before = SHAPE if hasattr(below, "variable") else below._input_metadata[number].shape
    return y.grad_fn, y.output_nr, torch.Size(before), y.shape


@pytest.mark.parametrize("name", MOVING)
def test_dimensions_move_as_backward_says(name):
    function = MOVING[name]
    node, _, before, after = read(function)
    places = operations.places(node, before, after)
    along = operations.dims_of(node, len(before)) if operations.kind_of(node) in operations.ALONG else ()
    moved = {d: place for d, place in places.items() if before[d] == after[place] > 1 and d not in along}
    assert moved and all(0 <= place < len(after) for place in places.values())
    for d, place in moved.items():
        for entry in range(after[place]):
            assert indices_reached(function, place, entry)[d] <= {entry}


@pytest.mark.parametrize("name", TAKING)
def test_the_indices_that_are_taken_are_those_that_backward_reaches(name):
    function = TAKING[name]
    node, number, before, after = read(function)
    taken = operations.taken_range(node, number, before, after)
    dim = operations.dim_of(node, len(before))
    reached = set().union(*(indices_reached(function, 0, entry)[dim] for entry in range(after[0])))
    assert reached == set(taken)


@pytest.mark.parametrize("name", PICKS)
def test_indices_pick_what_backward_reaches(name):
    function = PICKS[name]
    node, _, before, after = read(function)
    indices, first, places = operations.indexing(node, before)
    assert sorted([*indices, *places]) == list(range(len(before)))
    assert operations.indexed_dims(node, before) == list(indices)
    for d, place in places.items():
        assert all(indices_reached(function, place, entry)[d] == {entry} for entry in range(after[place]))
    for d, index in indices.items():
        for entry in range(index.shape[0]):
            assert indices_reached(function, first, entry)[d] == set(index[entry].flatten().tolist())
