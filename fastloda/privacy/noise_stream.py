"""Normal numbers from Philox (Salmon et al. 2011) by NumPy's ziggurat, in parallel and the same on any number of threads.

Each block of each draw has 2^66 words of Philox's sequence to itself. Philox is a keyed bijection of a counter. No way is known
to find its key or its next numbers from those drawn; for PyTorch's Mersenne Twister, which is linear, there is one. That is no
proof; `secure_noise.py` draws from the operating system's cipher.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from torch import Tensor

from fastloda.randomness import Secret

BLOCK = 1 << 16  # numbers that one thread draws at a time, for much longer than the 15 us that making a generator takes


class NoiseStream:
    """The stream of normal numbers that is derived from a secret; a forked child and a copy have another secret and stream.

    The ziggurat (Marsaglia & Tsang 2000) is exact except for the rounding of its uniform numbers to 52 and 53 bits. Beyond 3.65
    sigma it draws from the exact tail, up to 12.2 sigma.
    """

    def __init__(self, secret: Secret):
        self._secret = secret
        self._draws = count()  # `next` of it is atomic in Python, so that no two threads get the same draw

    def __reduce__(self):
        return NoiseStream, (Secret(),)

    def normal(self, shape: torch.Size) -> Tensor:
        """Draw independent N(0, 1) numbers of this shape, float64, on the CPU."""
        noise, draw = torch.empty(shape, dtype=torch.float64), next(self._draws)
        blocks = noise.view(-1).split(BLOCK)
        streams = [self._stream(draw, number) for number in range(len(blocks))]
        threads = min(torch.get_num_threads(), len(blocks))
        if threads == 1:
            for stream, block in zip(streams, blocks):
                _fill(stream, block)
        else:  # the threads end with this call, since a forked child would not have them; NumPy fills without Python's lock
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(_fill, streams, blocks))
        return noise

    def _stream(self, draw: int, block: int) -> np.random.Generator:
        """Make the generator of a block of a draw: the secret gives Philox's key and the highest word of its counter."""
        key, place = np.frombuffer(self._secret.key[:16], np.uint64), int.from_bytes(self._secret.key[16:24], "little")
        return np.random.Generator(np.random.Philox(key=key, counter=place << 192 | draw << 128 | block << 64))


def _fill(stream: np.random.Generator, block: Tensor) -> None:
    stream.standard_normal(out=block.numpy())
