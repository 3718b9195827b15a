"""Kernel launches and bytes of a private step of the paper's U-Net on a GPU may only fall: docs/results/launches.json."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def launches():
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("bench")
        import launches

        yield launches


def test_launches_and_bytes_may_only_fall(launches, record_property):
    """After a change that lowers them, run `python bench/launches.py --write`."""
    known = json.loads(launches.FIGURES.read_text())
    if known["torch"] != torch.__version__.split("+")[0]:
        pytest.skip(f"counted with torch {known['torch']}, whose operations others need not have")
    found = launches.counted(private=True).figures()
    record_property("private", found)
    assert all(found[name] <= known["private"][name] for name in ("launches", "bytes")), (found, known["private"])


def test_loads_and_stores_are_read_off_a_kernels_source(launches):
    """An addition in place is both a load and a store."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, factors, out, SIZE, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at = y + i
        factor = tl.load(factors + i, mask=i < SIZE)
        tl.store(at, tl.load(at, mask=i < SIZE) + factor * tl.load(x + i, mask=i < SIZE), mask=i < SIZE)
        tl.store(out + i, factor, mask=i < SIZE)

    loads, stores = launches.accesses(kernel)
    assert loads - {"BLOCK", "SIZE"} == {"x", "y", "factors"} and stores == {"y", "out"}
