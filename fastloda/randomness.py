"""Random streams that are unpredictable or repeatable, can be saved in a checkpoint, and differ in each forked child."""

import functools
import hashlib
import hmac
import inspect
import io
import os
import random
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from collections.abc import Generator as Yielding
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Generator, Tensor

# The bytes of a CPU generator's state: a header of 24, then the Mersenne Twister's 624 words of 8 bytes each, then a tail.
_HEADER, _WORDS = 24, 624
_KEY = 32  # bytes of a secret's key
_FEW, _DEEP = 64, 4  # largest container and greatest depth in which generators are looked for
T = TypeVar("T")


def unpredictable_generator(device: torch.device | str = "cpu") -> Generator:
    """Make a generator that the operating system seeds; on a CPU it draws the whole state, since 32 bits of a seed count."""
    return _generator_of(os.urandom, device)


def _generator_of(draw: Callable[[int], bytes], device: torch.device | str) -> Generator:
    """Make a generator whose seed or state is filled by `draw(count)`, which returns `count` random bytes."""
    generator = Generator(device).manual_seed(int.from_bytes(draw(8), "little") >> 1)
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = torch.frombuffer(bytearray(draw(4 * _WORDS)), dtype=torch.int32).long() & 0xFFFFFFFF
        state[_HEADER : _HEADER + 8 * _WORDS] = words.view(torch.uint8)
        generator.set_state(state)
    return generator


class Secret:
    """A secret key from which named random streams are derived; to anyone without the key they look independent.

    The operating system draws the key unless it is given. A forked child and a copy have another key.
    """

    def __init__(self, key: bytes | None = None):
        self.key = os.urandom(_KEY) if key is None else key
        _secrets.add(self)

    @classmethod
    def of_seed(cls, seed: int | None) -> "Secret":
        """Derive a secret from `seed`, foreseeable to anyone who knows it; if None, the operating system draws the key."""
        return cls(None if seed is None else hashlib.sha256(f"fastloda seed {seed}".encode()).digest())

    def digest(self, name: str, tensors: Iterable[Tensor] = ()) -> bytes:
        """Compute a keyed hash of a name and the tensors' bits, which reveals nothing about them to anyone without the key."""
        code = hmac.new(self.key, f"{name}\n".encode(), "sha256")
        for t in tensors:
            code.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return code.digest()

    def generator(self, name: str, device: torch.device | str = "cpu") -> Generator:
        """Make the generator of the stream called `name`."""
        bytes_of = hashlib.shake_256(self.digest(name)).digest(8 + 4 * _WORDS)
        return _generator_of(io.BytesIO(bytes_of).read, device)

    def __reduce__(self):
        return Secret, ()


_secrets: weakref.WeakSet[Secret] = weakref.WeakSet()
_held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_kept: dict[int, Generator] = {}  # generators of an older PyTorch, which allows no weak reference to them: never freed


def hold(source: T) -> T:
    """Register a generator, or an object that draws from generators, so that forked children draw other numbers; return it."""
    try:
        _held[id(source)] = source
    except TypeError as error:
        if isinstance(source, Generator):
            _kept[id(source)] = source
            return source
        kind = type(source).__name__
        raise TypeError(
            f"noise must come from a torch.Generator or an object with normal(shape), not a {kind}"
        ) from error
    return source


def renew(source: Any, devices: Container[str] = ("cpu", "cuda")) -> None:
    """Reseed a generator, or all that an object draws from, from the operating system; torch's only if on such `devices`."""
    for generator in generators_in([source, getattr(source, "normal", None)]):
        if isinstance(generator, Generator):
            if generator.device.type in devices:
                generator.set_state(unpredictable_generator(generator.device).get_state())
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)().state
        else:
            generator.seed()


def _part_from_parent() -> None:
    for secret in _secrets:
        secret.key = os.urandom(_KEY)
    for source in [*_held.values(), *_kept.values()]:
        renew(source, devices=("cpu",))  # no forked child can use CUDA


os.register_at_fork(after_in_child=_part_from_parent)


def generators_in(value: Any, depth: int = _DEEP) -> Iterator[Any]:
    """Yield the generators of torch, numpy and random that `value` (a function, an object, a container) draws from."""
    if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        if not isinstance(value, random.SystemRandom):  # which has no state
            yield value
    elif depth:
        for held in _held_by(value):
            yield from generators_in(held, depth - 1)


def _held_by(value: Any) -> list:
    """List what a function or an object refers to, except large containers of data."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        try:
            names = inspect.getclosurevars(value)
        except ValueError:  # a variable that is not set yet
            return []
        return [*names.nonlocals.values(), *names.globals.values(), *(value.__defaults__ or ())]
    if isinstance(value, (list, tuple, dict)):
        held = list(value.values()) if isinstance(value, dict) else list(value)
        return held if len(held) <= _FEW else []
    if inspect.isclass(value) or inspect.ismodule(value) or not hasattr(value, "__dict__"):
        return []
    return [*vars(value).values(), type(value).__call__] if callable(value) else list(vars(value).values())


def make_generators(devices: Mapping[str, torch.device | str], seed: int | None) -> dict[str, Generator]:
    """Make an independent generator for each name in `devices`, on its device; the operating system seeds if seed is None."""
    if seed is None:
        return {name: unpredictable_generator(device) for name, device in devices.items()}
    seeds = torch.randint(2**62, (len(devices),), generator=Generator().manual_seed(seed)).tolist()
    return {name: Generator(device).manual_seed(s) for (name, device), s in zip(devices.items(), seeds)}


def generator_states(generators: Mapping[str, Generator]) -> dict[str, Any]:
    """Collect the states of `generators` and of torch's, numpy's and Python's global ones, which dropout and data sets use."""
    states = {name: generator.get_state() for name, generator in generators.items()} | {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, words, *rest = cast(tuple, np.random.get_state())
    return states | {"numpy": (kind, words.tolist(), *rest), "python": random.getstate()}


def restore_generators(generators: Mapping[str, Generator], states: Mapping[str, Any]) -> None:
    """Set `generators` and the global ones to the states that `generator_states` returned."""
    for name, generator in generators.items():
        generator.set_state(states[name])
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"], i)
    np.random.set_state(tuple(states["numpy"]))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))


@contextmanager
def restored(generators: Mapping[str, Generator]) -> Yielding[Callable[[], bool]]:
    """Restore `generators` and the global ones after the context; yield a function that says whether any was used."""
    states = generator_states(generators)

    def drew() -> bool:
        now = generator_states(generators)
        same = (torch.equal(t, now[name]) if isinstance(t, Tensor) else t == now[name] for name, t in states.items())
        return not all(same)

    try:
        yield drew
    finally:
        restore_generators(generators, states)


@contextmanager
def seeded(seed: int) -> Yielding[None]:
    """Seed PyTorch's global CPU generator with `seed` inside the context, and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        yield
