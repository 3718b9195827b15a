"""The geometry of a two-dimensional convolution, for PyTorch and for the kernels. Needs no Triton."""

from typing import NamedTuple


class Conv(NamedTuple):
    """The geometry of a convolution; each entry is (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def output_size(self, *size: int) -> tuple[int, ...]:
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *self))

    def full(self) -> "Conv":
        """Make the convolution of the same taps at every position from which one of them touches the image."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return self._replace(stride=(1, 1), padding=(dh * (kh - 1), dw * (kw - 1)))

    def constants(self) -> dict[str, int]:
        """Name the numbers as the kernels take them, KH to DW: constants, so that divisions by them cost nothing."""
        pairs = {"K": self.kernel, "S": self.stride, "P": self.padding, "D": self.dilation}
        return {f"{name}{axis}": value for name, pair in pairs.items() for axis, value in zip("HW", pair)}
