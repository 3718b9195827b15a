"""Noise from Philox and the ziggurat: its distribution, its tail, its threads, and that nobody can repeat it."""

import copy
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats as statistics

from fastloda.privacy import noise_stream
from fastloda.privacy.noise import draws_alike, gaussian, own_noise
from fastloda.privacy.noise_stream import BLOCK, NoiseStream
from fastloda.randomness import Secret

CPU = torch.device("cpu")
KEY = bytes(range(32))


def stream(key: bytes = KEY) -> NoiseStream:
    return NoiseStream(Secret(key))


# ---- the distribution


def test_noise_is_normal(counts):
    """Check four moments, the Kolmogorov-Smirnov test, and that numbers are not correlated, not even between blocks."""
    n = counts(500_001, 10_000_001)
    values = stream().normal(torch.Size([n]))
    assert values.dtype == torch.float64 and values.shape == (n,)
    assert statistics.kstest(values[:200_000].numpy(), "norm").pvalue > 1e-4
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(values.pow(power).mean().item() - expected) <= 5 * math.sqrt(variance / n), power
    for lag in (1, 2, 4, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
        for power in (1, 2):  # squares too, for uncorrelated numbers may still depend on each other
            x = values if power == 1 else (values.square() - 1) / math.sqrt(2)
            assert abs((x[:-lag] * x[lag:]).mean().item()) <= 5 / math.sqrt(n - lag), (lag, power)


def test_the_tail_has_its_weight(counts, proof):
    """As many numbers lie beyond a bound on each side as a normal distribution has; the bound is far out with --prove."""
    n, bound = counts((1_000_000, 3.7), (100_000_000, 4.5))  # both beyond 3.65, where the ziggurat's tail begins
    above = below = 0
    drawn = stream()
    for _ in range(n // 1_000_000):
        values = drawn.normal(torch.Size([1_000_000]))
        above, below = above + int((values > bound).sum()), below + int((values < -bound).sum())
    expected = n * statistics.norm.sf(bound)
    proof(f"numbers beyond {bound} sigma of {n}, above, below and expected", (above, below, round(expected, 1)))
    assert all(abs(found - expected) <= 5 * math.sqrt(expected) for found in (above, below))


START = 3.6541528853610088  # where the tail begins; the edges of the 255 layers inside follow from their equal areas


def layer_edges() -> list[float]:
    """Compute the right edges of layers 1 to 255, after a 0 and before the width of layer 0 as a box with its tail."""
    height = math.exp(-(START**2) / 2)
    area = START * height + math.sqrt(math.pi / 2) * math.erfc(START / math.sqrt(2))
    edges = [area / height, START]
    for _ in range(254):
        edges.append(math.sqrt(-2 * math.log(math.exp(-(edges[-1] ** 2) / 2) + area / edges[-1])))
    return [0.0, *reversed(edges)]


EDGES = layer_edges()


def ziggurat(words) -> tuple[float, str]:
    """Draw a normal number from an iterator of 64-bit words by Marsaglia and Tsang's ziggurat; name the part it is from."""
    uniform = lambda: (next(words) >> 11) * 2.0**-53  # noqa: E731
    height = lambda x: math.exp(-x * x / 2)  # noqa: E731
    while True:
        word = next(words)
        layer, negative, rest = word & 255, word >> 8 & 1, word >> 9 & (1 << 52) - 1
        width, inner = (EDGES[256], START) if layer == 0 else (EDGES[layer], EDGES[layer - 1])
        x = rest * 2.0**-52 * width
        if x < inner:
            return -x if negative else x, "box"
        if layer == 0:
            while True:
                beyond, y = -math.log1p(-uniform()) / START, -math.log1p(-uniform())
                if 2 * y > beyond**2:
                    return (-1 if rest >> 8 & 1 else 1) * (START + beyond), "tail"
        if height(width) + (height(inner) - height(width)) * uniform() < height(x):
            return -x if negative else x, "wedge"


def test_numbers_are_the_ziggurats():
    """Another program gets the same numbers from the words of Philox, those of the tail included.

    The tail's uniforms have 53 bits and go down to 2^-53: the largest pair that is accepted lies beyond 12 sigma.
    """
    n = 60_000
    words = iter(stream()._stream(0, 0).bit_generator.random_raw(2 * n).tolist())
    by_hand, where = zip(*(ziggurat(words) for _ in range(n)))
    values = stream().normal(torch.Size([n]))
    torch.testing.assert_close(values, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert all(where.count(place) > 5 for place in ("box", "wedge", "tail"))
    log = 53 * math.log(2)  # -log of the smallest uniform
    assert START + min(log / START, math.sqrt(2 * log)) > 12


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (BLOCK + 3,), (3, BLOCK)])
def test_any_shape(shape):
    values = stream().normal(torch.Size(shape))
    assert values.shape == shape and len(values.unique()) == values.numel() and (values != 0).all()


# ---- streams


@pytest.fixture
def threads():
    """Return a function that sets the number of threads; restore the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_numbers_do_not_depend_on_the_threads(threads):
    draws = []
    for count in (1, 2, 3, 7):
        threads(count)
        source = stream()
        draws.append(torch.cat([source.normal(torch.Size([n])) for n in (5 * BLOCK + 1, 10, 2 * BLOCK)]))
    assert all(torch.equal(draws[0], other) for other in draws)
    assert len(draws[0].unique()) == len(draws[0])


def test_draws_and_their_blocks_lie_apart_in_one_sequence(monkeypatch):
    """Block b of draw d starts at counter b 2^64 + d 2^128; the secret gives the key and the counter's highest word."""
    source, starts = stream(), []
    monkeypatch.setattr(noise_stream, "_fill", lambda made, _: starts.append(made.bit_generator.state["state"]))
    for blocks in (1, 3, 2):
        source.normal(torch.Size([blocks * BLOCK]))
    secret = int.from_bytes(KEY[16:24], "little")
    places = [(0, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]
    assert [start["counter"].tolist() for start in starts] == [[0, *place, secret] for place in places]
    assert all(start["key"].tobytes() == KEY[:16] for start in starts)


def test_python_threads_that_share_a_source_draw_apart():
    source = stream()
    with ThreadPoolExecutor(8) as pool:
        draws = list(pool.map(lambda _: source.normal(torch.Size([8])), range(400)))
    assert len(torch.cat(draws).unique()) == 400 * 8


@pytest.mark.parametrize("byte", range(24))
def test_every_byte_of_the_secret_counts(byte):
    other = bytearray(KEY)
    other[byte] ^= 1
    one, two = (stream(bytes(key)).normal(torch.Size([100_000])) for key in (KEY, other))
    assert not torch.isin(one, two).any() and abs((one * two).mean().item()) < 5 / math.sqrt(100_000)


def test_secrets_give_independent_streams():
    secret = Secret()
    draws = [NoiseStream(Secret(secret.digest(f"noise {i}"))).normal(torch.Size([40_000])) for i in range(12)]
    correlation = torch.corrcoef(torch.stack(draws))
    assert (correlation - torch.eye(12)).abs().max() < 5 / math.sqrt(40_000)


# ---- nobody repeats it


def test_no_seed_repeats_it():
    draws = []
    for _ in range(3):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(gaussian(torch.Size([64]), 1.0, CPU))
        draws.append(NoiseStream(Secret()).normal(torch.Size([64])))
    assert len(torch.cat(draws).unique()) == 6 * 64


def test_a_forked_child_and_a_copy_draw_other_numbers():
    source = stream()
    first = source.normal(torch.Size([32]))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, source.normal(torch.Size([2, 16])).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(reading, 1 << 12)), dtype=torch.float64)
    copies = [copy.copy(source), copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    draws = [first, theirs, *(one.normal(torch.Size([32])) for one in (*copies, source))]
    assert len(theirs) == 32 and len(torch.cat(draws).unique()) == 6 * 32


def test_a_forked_child_draws_on_threads_of_its_own():
    """A pool that the parent made has no threads in the child, which would wait forever."""
    stream().normal(torch.Size([3 * BLOCK]))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        stream().normal(torch.Size([3 * BLOCK]))
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_each_device_has_one_source_in_a_process():
    assert own_noise(CPU) is own_noise(torch.device("cpu")) and isinstance(own_noise(CPU), NoiseStream)


def test_another_numpy_may_draw_other_numbers(monkeypatch):
    """NumPy does not promise the same streams in other versions: a recorded release is not repeated with another version."""
    here = draws_alike(CPU)
    monkeypatch.setattr(noise_stream.np, "__version__", "99.0")
    assert draws_alike(CPU) != here
