"""Random streams: unpredictable or repeatable, and held by a checkpoint."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

# A CPU generator's state in bytes: 24 of a header, then the Mersenne Twister's 624 words in 8 bytes each, then a tail.
_HEADER, _WORDS = 24, 624


def unpredictable_generator(device: torch.device | str = "cpu") -> Generator:
    """Seeded by the operating system. A CPU generator uses 32 bits of a seed, few enough to try all: its state is filled."""
    generator = Generator(device).manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = torch.frombuffer(bytearray(os.urandom(4 * _WORDS)), dtype=torch.int32).long() & 0xFFFFFFFF
        state[_HEADER : _HEADER + 8 * _WORDS] = words.view(torch.uint8)
        generator.set_state(state)
    return generator


def make_generators(devices: Mapping[str, torch.device | str], seed: int | None) -> dict[str, Generator]:
    """Name -> an independent generator on its device; seeded by the operating system if seed is None."""
    if seed is None:
        return {name: unpredictable_generator(device) for name, device in devices.items()}
    seeds = torch.randint(2**62, (len(devices),), generator=Generator().manual_seed(seed)).tolist()
    return {name: Generator(device).manual_seed(s) for (name, device), s in zip(devices.items(), seeds)}


def generator_states(generators: Mapping[str, Generator]) -> dict[str, Tensor]:
    """The states of `generators`, and of torch's global ones, which dropout draws from."""
    states = {name: generator.get_state() for name, generator in generators.items()} | {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_generators(generators: Mapping[str, Generator], states: Mapping[str, Tensor]) -> None:
    """Undo `generator_states`."""
    for name, generator in generators.items():
        generator.set_state(states[name])
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"], i)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's global CPU generator starts from `seed` inside, and is as it was after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        yield
