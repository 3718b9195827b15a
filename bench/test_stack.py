"""One training step of six adapted 3 x 3 convolutions: FastLoDA's private step against plain PyTorch without privacy.

Nothing here fails on time; it fails if the private step's gradients are not the truth.
"""

import measure
import stack
import torch

from fastloda import GhostClipper

CASES = {
    "cpu": [(32, 64, 32, False), (32, 64, 32, True), (256, 32, 8, False), (256, 32, 8, True)],
    "smoke": [(4, 16, 8, False), (4, 16, 8, True)],
}
ROUNDS = {"cpu": 15, "smoke": 2}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", CASES[metafunc.config.getoption("--bench-scale")], ids=_name)


def _name(case) -> str:
    size, channels, resolution, channels_last = case
    return f"n{size}-c{channels}-{resolution}x{resolution}-{'channels_last' if channels_last else 'nchw'}"


def test_private_step_against_plain(case, scale, record_row, benchmark):
    assert_right(case)
    contenders = {"plain": stack.plain_step(*case), "private": stack.private_step(*case)}
    timed = measure.paired_rounds(contenders, ROUNDS[scale])
    plain, private = (measure.peak_allocation(make, *case) for make in (stack.plain_step, stack.private_step))
    figures = {
        "case": _name(case),
        "plain img/s": case[0] / timed.seconds["plain"],
        "private img/s": case[0] / timed.seconds["private"],
        "time x": timed.ratio["private"],
        "plain MiB": plain / 2**20,
        "memory x": private / plain,
    }
    record_row(**figures)
    benchmark.extra_info.update(figures)
    benchmark.pedantic(contenders["private"], rounds=ROUNDS[scale], warmup_rounds=1)


def assert_right(case) -> None:
    """The clipped sum of the private step is that of one plain backward pass per sample."""
    plain, ours, x = stack.plain_stack(case[1]), stack.loda_stack(case[1]), stack.batch(*case)[:4]
    parameters = [p for p in plain.parameters() if p.requires_grad]
    truth, norms = [torch.zeros_like(p) for p in parameters], []
    for sample in x.split(1):
        grads = torch.autograd.grad(stack.losses(plain, sample).sum(), parameters)
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
        for total, g in zip(truth, grads):
            total += g * (norms[0] / norms[-1]).clamp(max=1.0)
    clipper = GhostClipper(ours, max_grad_norm=float(norms[0]))
    clipper.accumulate(stack.losses(ours, x))
    clipper.privatize(noise_multiplier=0.0, expected_batch_size=1)
    found = [p.grad for layer in ours for p in (layer.loda_A, layer.loda_B)]
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
