"""The operations of a LoDA layer over the layers of the paper's U-Net: time against the floor of bytes and flops."""

from collections import Counter
from functools import cache

import operations
import pytest
import torch
from compare import WARMUP, statistics_of
from machine import CUDA, seconds
from operations import Layer, Operation, Tensors
from scales import Scale, scale_of

from fastloda.kernels.conv import Conv


@cache
def layers(scale: Scale) -> Counter[Layer]:
    """Count the layers to time, the headline layers first, so that a run that is stopped has measured these."""
    chosen: Counter[Layer] = Counter()
    for channels, size in scale.headline:
        chosen[Layer(channels, channels, (size, size), Conv((3, 3), padding=(1, 1)))] = 0
    unet = operations.unet_layers()
    kept = sorted(unet, key=lambda layer: (-layer.conv.taps, -layer.size[0], layer.channels))
    chosen.update({layer: unet[layer] for layer in kept[: scale.kernel_layers]})
    return chosen


def pytest_generate_tests(metafunc):
    scale = scale_of(metafunc.config)
    metafunc.parametrize("dtype", [getattr(torch, name) for name in scale.kernel_dtypes], ids=lambda d: str(d)[6:])
    if "layer" in metafunc.fixturenames:
        names = ["headline, " * (i < len(scale.headline)) + layer.name for i, layer in enumerate(layers(scale))]
        metafunc.parametrize("layer", list(layers(scale)), ids=names)


def test_layer(layer, dtype, scale, benchmark, peaks, results):
    memory_format = torch.channels_last if CUDA else torch.contiguous_format
    operations.check(layer, dtype, memory_format)
    tensors = Tensors(layer, scale.kernel_batch, dtype, memory_format)
    times = _times(operations.layer_operations(tensors), scale.kernel_rounds, benchmark)
    for operation, values in times.items():
        results.add("kernels", row(operation, values, peaks, dtype, layer.name, layers(scale)[layer], scale))


def test_clip_and_sum(dtype, scale, benchmark, peaks, results):
    """Gradients are float32 whatever the dtype of the model."""
    if dtype != torch.float32:
        pytest.skip("stored gradients are float32")
    chosen = [operations.clip_and_sum(operations.unet_layers(), scale.kernel_batch)]
    for operation, values in _times(chosen, scale.kernel_rounds, benchmark).items():
        results.add("kernels", row(operation, values, peaks, dtype, "all of the U-Net", 1, scale))


def _times(chosen: list[Operation], rounds: int, benchmark) -> dict[Operation, list[float]]:
    """Time operations in interleaved rounds; on a GPU as CUDA graphs, by its clock, with its cache emptied before each run."""
    chosen = [operation.captured() for operation in chosen] if CUDA else chosen
    times: dict[Operation, list[float]] = {operation: [] for operation in chosen}

    def one_round() -> None:
        for operation in chosen:
            times[operation] += _gpu_seconds(operation.run) if CUDA else [seconds(operation.run)]

    benchmark.pedantic(one_round, **({"rounds": 1} if CUDA else {"rounds": rounds, "warmup_rounds": WARMUP}))
    return {operation: values if CUDA else values[-rounds:] for operation, values in times.items()}


def _gpu_seconds(run) -> list[float]:
    from triton.testing import do_bench

    return [milliseconds / 1000 for milliseconds in do_bench(run, warmup=10, rep=40, return_mode="all")]


def row(operation: Operation, values, peaks, dtype, layer: str, count: int, scale: Scale) -> dict:
    statistics = statistics_of(values)
    floor = peaks.floor(operation.bytes, operation.flops, dtype)
    name = operation.name if dtype == torch.float32 else f"{operation.name}, {str(dtype)[6:]}"
    return {
        "case": f"{name}, {layer}, n{scale.kernel_batch}",
        "operation": name,
        "layer": layer,
        "layers": count,
        "samples": scale.kernel_batch,
        "bytes": operation.bytes,
        "flops": operation.flops,
        "in_graph": operation.in_graph,
        "seconds": statistics,
        "floor_seconds": floor,
        "fraction_of_floor": floor / statistics["median"],
    }
