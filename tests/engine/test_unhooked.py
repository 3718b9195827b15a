"""Hooks that change gradients between the loss and a private module's outputs are refused; hooks that only look are not."""

import pytest
import torch
import torch.nn.functional as F
from outputs import C, N, Several, Y, outputs
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastloda import PrivacyError
from fastloda.engine.module import PrivateModule, Tape


def mix(g):
    return g / g.norm()


def mix_in_place(g):
    g.div_(g.norm())


def mix_all(grads, *_):
    return tuple(g if g is None else mix(g) for g in grads)


def hooked(z, hook=mix):
    z.register_hook(hook)
    return z


def on_operation(z, kind, hook=mix_all):
    getattr(z.grad_fn, kind)(hook)
    return z


class Squares(nn.Module):
    def forward(self, z):
        return z.square() * 1


def on_module(kind, hook):
    module = Squares()
    getattr(module, kind)(hook)
    return lambda z: module(z).mean()


def while_it_runs(z):
    inner = z * 2
    outer = hooked(inner * 3, lambda g: inner.register_hook(mix) and None)
    return outer.square().mean()


def several_uses(hook):
    def loss(z):
        z = hooked(z * 2, hook)
        return z.square().mean() + z.abs().mean() + z.exp().mean()

    return loss


def of_a_tensor_that_is_gone(z):
    return hooked(z * 2).square().mean()


def at_the_loss(z):
    return hooked(z.square().mean(), lambda g: g * float(z.detach().norm()))


CHANGED = {
    "outputs": lambda z: hooked(z).square().mean(),
    "outputs, in place": lambda z: hooked(z, mix_in_place).square().mean(),
    "between": of_a_tensor_that_is_gone,
    "between, in place": lambda z: hooked(z * 2, mix_in_place).square().mean(),
    "an operation": lambda z: on_operation(z * 2, "register_hook").square().mean(),
    "before an operation": lambda z: on_operation(z * 2, "register_prehook").square().mean(),
    "before the outputs": lambda z: on_operation(z, "register_prehook").square().mean(),
    "while it runs": while_it_runs,
    "module": on_module("register_full_backward_hook", lambda module, grads, _: mix_all(grads)),
    "before a module": on_module("register_full_backward_pre_hook", lambda module, grads: mix_all(grads)),
    "several uses": several_uses(mix),
    "several uses, in place": several_uses(mix_in_place),
    "the loss": at_the_loss,
    "checkpointed": lambda z: checkpoint(of_a_tensor_that_is_gone, z, use_reentrant=False),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_hook_that_changes_gradients_is_refused(name):
    out, tape = outputs(N, C)
    with pytest.raises(PrivacyError, match="gradient hook"):
        CHANGED[name](out).backward()
    assert tape.empty


seen = []
LOOKED_AT = {
    "kept": lambda z: (z.retain_grad(), z.square().mean())[1],
    "logged": lambda z: hooked(z * 2, lambda g: seen.append(g.norm())).square().mean(),
    "handed back": lambda z: hooked(z * 2, torch.clone).square().mean(),
    "module": on_module("register_full_backward_hook", lambda module, grads, _: None),
    "several uses": several_uses(lambda g: None),
    "no number": lambda z: (z * float("nan")).mean() + z.mean(),
    "in place": lambda z: (z * 1).mul_(2).add_(1).square().mean(),
    "into a view": lambda z: (lambda a: (a[:, 1:].mul_(2), a)[1])(z * 1).square().mean(),
    "checkpointed": lambda z: checkpoint(lambda z: (z * 2).square().mean(), z, use_reentrant=False),
    "half precision": lambda z: F.cross_entropy(z.bfloat16(), Y) + z.mean(),
    "complex": lambda z: torch.fft.fft(z, dim=1).abs().mean(),
    "parts": lambda z: sum(part.square().mean() for part in z.split(2, 1)),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_hooks_that_look_pass(name):
    out, tape = outputs(N, C)
    LOOKED_AT[name](out).backward()
    assert tape.rows == N


@pytest.mark.parametrize("which", [0, 1])
def test_a_hook_above_one_of_two_calls_leaves_nothing_of_the_other(which):
    module = PrivateModule(Several((N, C), (N, C)), tape := Tape("mean"))
    outs = [module(torch.zeros(1))[0] for _ in range(2)]
    with pytest.raises(PrivacyError, match="gradient hook"):
        (outs[1 - which].square().mean() + hooked(outs[which]).square().mean()).backward()
    assert tape.empty


def test_hooks_on_the_graph_stay_when_it_is_kept():
    out, tape = outputs(N, C)
    z = out * 2
    calls = []
    z.grad_fn.register_hook(lambda *grads: calls.append(1))
    loss = z.square().mean()
    for _ in range(2):
        loss.backward(retain_graph=True)
        tape.clear()
    assert len(calls) == 2


@pytest.mark.parametrize("unpack", [lambda t: t / t.norm(), lambda t: t])
def test_saved_values_that_hooks_hand_back(unpack):
    """Nobody can tell whether such hooks alter the values; but computing the loss outside of them is easy."""
    out, tape = outputs(N, C)
    with saved_tensors_hooks(lambda t: t, unpack):
        loss = out.square().mean()
    with pytest.raises(PrivacyError, match="saved_tensors_hooks"):
        loss.backward()
    assert tape.empty


def test_saved_values_that_pytorch_hands_back():
    out, tape = outputs(N, C)
    with torch.autograd.graph.save_on_cpu():
        loss = out.square().mean()
    loss.backward()
    assert tape.rows == N
