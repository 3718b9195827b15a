"""Published data sets: tiny files in each one's real format are read back; what is wrong with a file is named."""

import gzip
import importlib
import os
import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from fastloda.synthesis.classify import accuracy, train_classifier
from fastloda.synthesis.cli import main
from fastloda.synthesis.data import (
    MATCHES,
    NAMES,
    PUBLIC_PARTNERS,
    ByteImages,
    FolderFacts,
    LabelledImages,
    as_imagenet32,
    cifar10,
    class_names,
    colour_digits_split,
    colour_font_digits,
    describe,
    digits_split,
    font_digits,
    font_digits_as_mnist,
    font_styles,
    font_styles_as_mnist,
    image_folder,
    imagenet10,
    imagenet32,
    load_npz,
    look_at,
    mnist,
    mnist5k_split,
    open_dataset,
    stratified_subset,
    svhn,
)
from fastloda.synthesis.data.centring import centred_by_ink
from fastloda.synthesis.data.safe_pickle import load_plain_pickle
from fastloda.synthesis.diffusion import UNet, UNetConfig
from fastloda.synthesis.diffusion.pretrain import PublicTraining, pretrain
from fastloda.synthesis.inputs import (
    NAMED,
    files_of,
    full_name,
    open_for_unet,
    open_images,
    open_public,
    open_tests,
    sensible_size,
)

MNIST, CIFAR10, SVHN, IMAGENET32 = (
    importlib.import_module(f"fastloda.synthesis.data.{name}") for name in ("mnist", "cifar10", "svhn", "imagenet32")
)
TRAIN, TEST = 12, 7  # images in the tiny files
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Set the published counts to those of the tiny files, whose checksums are not the published ones."""
    for module in (MNIST, SVHN):
        monkeypatch.setattr(module, "COUNTS", {"train": TRAIN, "test": TEST})
    monkeypatch.setattr(CIFAR10, "COUNT", TRAIN)
    monkeypatch.setattr(IMAGENET32, "COUNTS", {"train": 10 * TRAIN, "test": TEST})
    for module in (MNIST, CIFAR10, SVHN):
        monkeypatch.setattr(module, "MD5", {})


def some_bytes(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """Convert floats back to bytes; refuse values that stand for no byte."""
    scaled = (images + 1) * 127.5
    assert images.dtype == torch.float32 and (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().to(torch.uint8).numpy()


def refuses(message: str, error=ValueError):
    return pytest.raises(error, match=message)


# --- MNIST


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, *, zipped: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        parts = written[split] = some_bytes(count, 28, 28), RANDOM.integers(0, 10, count, dtype=np.uint8)
        for name, part in zip(MNIST.FILES[split], parts, strict=True):
            content = gzip.compress(idx(part)) if zipped else idx(part)
            (folder / (name + ".gz" * zipped)).write_bytes(content)
    return written


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inside", [".", "MNIST/raw"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_comes_back(tmp_path, zipped, inside, split):
    pixels, labels = write_mnist(tmp_path / inside, zipped=zipped)[split]
    data = mnist(tmp_path, split)
    assert np.array_equal(as_bytes(data.images), pixels[:, None])
    assert data.labels.tolist() == labels.tolist() and data.num_classes == 10


def test_mnist_is_padded_with_background(tmp_path):
    pixels, _ = write_mnist(tmp_path)["train"]
    for size, before in ((32, 2), (33, 2), (29, 0)):
        images = mnist(tmp_path, size=size).images
        assert images.shape == (TRAIN, 1, size, size)
        inner = slice(before, before + 28)
        assert np.array_equal(as_bytes(images[:, :, inner, inner]), pixels[:, None])
        images[:, :, inner, inner] = -1
        assert (images == -1).all()
    with refuses("size must be at least 28, not 27"):
        mnist(tmp_path, size=27)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(some_bytes(TRAIN)), "is 8 bytes|begins with 00000801, an idx file of such bytes with 00000803"),
        (idx(some_bytes(TRAIN, 28, 28))[:-1], "holds less than the 9408 bytes that its header states"),
        (idx(some_bytes(TRAIN, 28, 28)) + b"x", "holds more than the 9408 bytes that its header states"),
        (idx(some_bytes(TRAIN - 1, 28, 28)), "11 images, not the 12 published"),
        (idx(some_bytes(TRAIN, 27, 28)), r"images of \[27, 28\] pixels, not \[28, 28\]"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 28, 28), "4294967295 images, not the 12 published"),
        (struct.pack(">HBB3I", 0, 0x0D, 3, TRAIN, 28, 28), "begins with 00000d03"),
        (struct.pack("<HBB3I", 0, 8, 3, TRAIN, 28, 28) + bytes(9408), "201326592 images"),  # little-endian
        (b"", "0 bytes are no idx file"),
        (gzip.compress(idx(some_bytes(TRAIN, 28, 28)), mtime=0)[:-99], "ended before the end-of-stream"),
        (gzip.compress(idx(some_bytes(TRAIN, 28, 28)), mtime=0)[:9] + bytes(50), "rror"),
    ],
)
def test_what_is_wrong_with_an_idx_file_is_said(tmp_path, content, message):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with refuses(message) as caught:
        mnist(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    mnist(tmp_path, "test")  # the other part is intact


def test_mnist_refuses_other_labels(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.full(TRAIN, 10, np.uint8)))
    with refuses(r"labels must lie in 0 \.\. 9; 12 of 12 values do not: 10, 10, 10") as caught:
        mnist(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


# --- checksums


def test_another_file_than_the_published_one_is_warned_of_and_read(tmp_path, monkeypatch):
    write_mnist(tmp_path, zipped=True)
    names = [f"{name}.gz" for name in MNIST.FILES["test"]]
    for name in names:
        monkeypatch.setitem(MNIST.MD5, name, "0" * 32)
    with pytest.warns(UserWarning, match="not the published 0000") as caught:
        mnist(tmp_path, "test")
    assert [str(tmp_path / name) in str(warning.message) for name, warning in zip(names, caught, strict=True)] == [
        True
    ] * 2


def test_the_published_file_is_not_warned_of(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(TRAIN, np.uint8)))
    monkeypatch.setitem(MNIST.MD5, "train-labels-idx1-ubyte", "8c5c466e15e42cc63a5558bcd799b233")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnist(tmp_path)


# --- CIFAR-10


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Pickle a batch as Python 2 and NumPy 1 wrote the published ones: with texts where Python 3 has bytes."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def name(module: str, attribute: str) -> bytes:
        return f"c{module}\n{attribute}\n".encode()

    start = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + number(0) + b"\x85" + text(b"b")
    dtype = name("numpy", "dtype") + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = b"".join(map(number, pixels.shape)) + b"\x86"
    array = start + b"\x87R" + b"(" + number(1) + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    return (
        b"\x80\x02}("
        + text(b"batch_label") + text(b"training batch 1 of 5")
        + text(b"data") + array
        + text(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
        + b"u."
    )  # fmt: skip


def python3_pickle(protocol: int):
    return lambda pixels, labels: pickle.dumps({"data": pixels, "labels": labels}, protocol)


def binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.column_stack([np.array(labels, np.uint8), pixels]).tobytes()


WRITERS = {"python 2": python2_pickle, "binary": binary} | {f"python 3, {p}": python3_pickle(p) for p in range(6)}


def write_cifar10(folder: Path, write=python2_pickle) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in [*CIFAR10.FILES["train"], *CIFAR10.FILES["test"]]:
        pixels, labels = written[name] = some_bytes(TRAIN, 3072), RANDOM.integers(0, 10, TRAIN).tolist()
        (folder / (name + ".bin" * (write is binary))).write_bytes(write(pixels, labels))
    return written


@pytest.mark.parametrize("inside", [".", "cifar-10-batches-py", "cifar-10-batches-bin"])
@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10_comes_back(tmp_path, writer, inside):
    written = write_cifar10(tmp_path / inside, WRITERS[writer])
    for split, names in CIFAR10.FILES.items():
        data = cifar10(tmp_path, split)
        pixels = np.concatenate([written[name][0] for name in names]).reshape(-1, 3, 32, 32)
        assert np.array_equal(as_bytes(data.images), pixels)
        assert data.labels.tolist() == sum((written[name][1] for name in names), []) and data.num_classes == 10


def test_the_pixels_are_red_rows_first():
    """CIFAR-10's "data" has 1024 red values, row by row, then green, then blue."""
    batches = importlib.import_module("fastloda.synthesis.data.batches")
    image = np.arange(3072).reshape(batches.SHAPE)
    assert image[0, 0, 1] == 1 and image[0, 1, 0] == 32 and image[1, 0, 0] == 1024


GOOD_PIXELS, GOOD_LABELS = some_bytes(TRAIN, 3072), [1] * TRAIN


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": GOOD_PIXELS}, r"no labels; it has \['data'\]"),
        ([GOOD_PIXELS], "holds a list, not a dict"),
        ({"data": GOOD_PIXELS.tolist(), "labels": GOOD_LABELS}, r"uint8 \[n, 3072\], not int64 \[12, 3072\]"),
        ({"data": GOOD_PIXELS[:, :-1], "labels": GOOD_LABELS}, r"uint8 \[n, 3072\], not uint8 \[12, 3071\]"),
        ({"data": GOOD_PIXELS.view(np.int8), "labels": GOOD_LABELS}, r"uint8 \[n, 3072\], not int8 \[12, 3072\]"),
        (
            {"data": GOOD_PIXELS, "labels": GOOD_LABELS[:-1]},
            r"labels must be of shape \[12\], one an image, not \[11\]",
        ),
        ({"data": GOOD_PIXELS, "labels": [0.5] * TRAIN}, "labels must be integers, not float64"),
        ({"data": GOOD_PIXELS, "labels": [10] * TRAIN}, r"lie in 0 \.\. 9; 12 of 12"),
        ({"data": GOOD_PIXELS, "labels": [-1] * TRAIN}, r"lie in 0 \.\. 9; 12 of 12"),
        ({"data": GOOD_PIXELS[:-1], "labels": GOOD_LABELS[:-1]}, "11 images, not the 12 published"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(tmp_path, batch, message):
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_4"
    path.write_bytes(pickle.dumps(batch))
    with refuses(message) as caught:
        cifar10(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_cut_binary_batch_is_refused(tmp_path):
    write_cifar10(tmp_path, binary)
    path = tmp_path / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with refuses(r"test_batch\.bin: 36875 bytes are no whole number of records of 3073"):
        cifar10(tmp_path, "test")
    path.write_bytes(binary(GOOD_PIXELS[:5], GOOD_LABELS[:5]))
    with refuses(r"test_batch\.bin: 5 images, not the 12 published"):
        cifar10(tmp_path, "test")


# --- pickles that run code


class Runs:
    """An object that writes a file when it is unpickled in the ordinary way."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def reading_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(content)
    with refuses(message) as caught:
        load_plain_pickle(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ["touch {proof}"], f"{os.system.__module__}.system"),
        (eval, ["open('{proof}', 'w')"], "eval"),
        (exec, ["open('{proof}', 'w')"], "exec"),
        (open, ["{proof}", "w"], "open"),
        (Path, ["{proof}"], "Path"),
        (np.memmap, ["{proof}", "u1", "w+", 0, (8,)], "memmap"),
        (np.save, ["{proof}", 3], "numpy.save"),
        (getattr, [np, "save"], "getattr"),
        (importlib.import_module, ["os"], "import_module"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, protocol, function, arguments, named):
    proof = tmp_path / "proof"
    arguments = [a.format(proof=proof) if isinstance(a, str) else a for a in arguments]
    if function is getattr:
        arguments = ["text", "upper"]
    content = pickle.dumps({"data": Runs(function, *arguments)}, protocol)
    reading_is_refused(tmp_path, content, f"refused, for unpickling it would run .*{named}")
    assert not proof.exists()
    if function is eval:  # read in the ordinary way, the same file does run code
        pickle.loads(content)
        assert proof.exists()


def test_a_malicious_batch_stops_cifar10(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(Runs(os.system, f"touch {tmp_path / 'proof'}")))
    with refuses("refused, for unpickling it would run posix.system: only plain data and arrays are read") as caught:
        cifar10(tmp_path, "test")
    assert str(caught.value).startswith(f"{tmp_path / 'test_batch'}: refused")  # the path is named once
    assert not (tmp_path / "proof").exists()


DTYPE = b"cnumpy\ndtype\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DTYPE + b"(N}X\x0c\x00\x00\x00__defaults__Nstb.", "refused, for it would change a function"),
        (b"cnumpy\nndarray\n(K\x01tR.", "not callable"),  # the class itself would accept any buffer and strides
        (DTYPE + b"(X\x01\x00\x00\x00OtR.", "only arrays of numbers are read, not of object"),
        (DTYPE + b"(X\x02\x00\x00\x00V8tR.", "only arrays of numbers"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x04\x00\x00\x00zlibtR.", "bytes written in 'zlib'"),
        (
            b"cfastloda.synthesis.data.safe_pickle\n_ALLOWED\n.",
            "would run fastloda.synthesis.data.safe_pickle._ALLOWED",
        ),
        (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", r"would run numpy.ndarray.__class__"),
        (b"P1\n.", "persistent"),
        (b"\x82\x01.", "unregistered extension code 1"),
        (b"", "Ran out of input"),
    ],
)
def test_no_way_around_the_names_that_are_allowed(tmp_path, content, message):
    reading_is_refused(tmp_path, content, message)


def test_a_dtype_with_a_dangerous_state_is_read_as_plain_numbers(tmp_path):
    """A dtype's flags could tell NumPy that the numbers are pointers to objects; only the byte order is used."""
    dtype = np.dtype("<u8")
    state = list(dtype.__reduce__()[2])
    state[-1] = 0b111111  # NPY_ITEM_REFCOUNT and NPY_ITEM_IS_POINTER are among them
    array = np.arange(3, dtype=dtype)

    class Poisoned:
        def __reduce__(self):
            return array.__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (3,), PoisonedDType(), False, array.tobytes())

    class PoisonedDType:
        def __reduce__(self):
            return np.dtype, ("u8", False, True), tuple(state)

    (tmp_path / "batch").write_bytes(pickle.dumps(Poisoned()))
    read = load_plain_pickle(tmp_path / "batch")
    assert np.asarray(read).tolist() == [0, 1, 2] and not read.dtype.hasobject and read.dtype.flags == dtype.flags
    assert np.dtype("u8").flags == 0


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("code", ["u1", "<i8", ">i4", "f4", "?", ">f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_plain_data_comes_back(tmp_path, protocol, code, shape):
    array = np.asarray(some_bytes(*shape)).astype(code)
    value = {"a": [1, 2.5, None, True, "text", b"\xff\x00"], "b": (array, array.T), "c": {1: 2**70}}
    (tmp_path / "batch").write_bytes(pickle.dumps(value, protocol))
    read = load_plain_pickle(tmp_path / "batch")
    assert read["a"] == value["a"] and read["c"] == value["c"]
    ordinary = pickle.loads((tmp_path / "batch").read_bytes())
    for found, wanted in zip(read["b"], ordinary["b"], strict=True):
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.sampled_from([1, 2, 4, 128]), cut=st.booleans())
def test_a_damaged_batch_is_read_or_refused_but_never_fails_otherwise(tmp_path_factory, place, flip, cut):
    content = bytearray(python2_pickle(GOOD_PIXELS[:1], [1]))
    at = int(place * len(content))
    if cut:
        content = content[:at]
    elif chr(content[at] ^ flip) not in "jr":  # memo opcodes: their index makes Python itself take up to 64 GiB
        content[at] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        load_plain_pickle(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


# --- SVHN


def write_svhn(folder: Path, **change) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        pixels, labels = written[split] = some_bytes(32, 32, 3, count), 1 + np.arange(count) % 10
        content = {"X": pixels, "y": labels.astype(np.uint8)[:, None], **change}
        savemat(folder / SVHN.FILES[split], content, do_compression=True)
    return written


@pytest.mark.parametrize("inside", [".", "SVHN"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_comes_back_and_its_ten_is_a_zero(tmp_path, split, inside):
    pixels, _ = write_svhn(tmp_path / inside)[split]
    data = svhn(tmp_path, split)
    assert np.array_equal(as_bytes(data.images), pixels.transpose(3, 2, 0, 1))
    assert data.labels.tolist() == [(1 + i % 10) % 10 for i in range(pixels.shape[3])] and data.num_classes == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": some_bytes(TRAIN, 32, 32, 3)}, r"X must be uint8 \[32, 32, 3, n\], not uint8 \[12, 32, 32, 3\]"),
        ({"X": np.zeros((32, 32, 3, TRAIN))}, "not float64"),
        ({"X": some_bytes(32, 32, 3, TRAIN + 1)}, "13 images, not the 12 published"),
        ({"y": np.arange(TRAIN)}, r"labels must lie in 1 \.\. 10; 2 of 12 values do not: 0, 11"),
        ({"y": np.ones(TRAIN + 1, np.uint8)}, r"labels must be of shape \[12\], one an image, not \[13\]"),
        ({"y": np.full(TRAIN, 1.5)}, "labels must be integers, not float64"),
    ],
)
def test_what_is_wrong_with_a_mat_file_is_said(tmp_path, change, message):
    write_svhn(tmp_path, **change)
    with refuses(message) as caught:
        svhn(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'train_32x32.mat'}: ")


def test_a_mat_file_without_the_arrays_or_damaged_is_refused(tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    savemat(path, {"Z": 1})
    with refuses(r"train_32x32\.mat: no X or y in it"):
        svhn(tmp_path)
    for content in (b"", b"MATLAB 7.3", whole[:200], whole[: len(whole) // 2], b"\x00" * 200, b"\xff" * 5000):
        path.write_bytes(content)
        with refuses(r"train_32x32\.mat: "):
            svhn(tmp_path)


# --- ImageNet32


def write_imagenet32(folder: Path, *, pickled: bool = False, labels=None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write files that have labels of the ten matching classes and of others."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in [*IMAGENET32.FILES["train"], *IMAGENET32.FILES["test"]]:
        count = TEST if name == "val_data" else TRAIN
        pixels = some_bytes(count, 3072)
        chosen = (
            RANDOM.permutation([m.label for m in MATCHES] + [1, 1000])[:count] if labels is None else labels[:count]
        )
        written[name] = pixels, np.asarray(chosen)
        batch = {"data": pixels, "labels": np.asarray(chosen).tolist(), "mean": pixels.mean(axis=0)}
        if pickled:
            (folder / name).write_bytes(pickle.dumps(batch, 4))
        else:
            np.savez(folder / f"{name}.npz", **batch)
    return written


def joined(written: dict, split: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = zip(*(written[name] for name in IMAGENET32.FILES[split]), strict=True)
    return np.concatenate(pixels).reshape(-1, 3, 32, 32), np.concatenate(labels)


@pytest.mark.parametrize(("inside", "pickled"), [(".", False), ("Imagenet32_train_npz", False), (".", True)])
def test_imagenet32_comes_back_as_bytes(tmp_path, inside, pickled):
    written = write_imagenet32(tmp_path / inside, pickled=pickled)
    for split in ("train", "test"):
        data = imagenet32(tmp_path, split)
        pixels, labels = joined(written, split)
        assert isinstance(data.images, ByteImages) and data.num_classes == 1000
        assert np.array_equal(data.images.pixels, pixels) and np.array_equal(data.labels, labels - 1)


def test_the_ten_matches_get_the_labels_of_cifar10(tmp_path):
    written = write_imagenet32(tmp_path)
    for split in ("train", "test"):
        data = imagenet10(tmp_path, split)
        pixels, labels = joined(written, split)
        kept = [i for i, label in enumerate(labels) if 1 < label < 1000]
        assert np.array_equal(data.images.pixels, pixels[kept]) and data.num_classes == 10
        assert [MATCHES[y].label for y in data.labels] == labels[kept].tolist()
    assert [match.cifar10 for match in MATCHES] == list(CIFAR10.CLASSES)


def test_cifar10_gets_the_labels_of_the_matches():
    data = LabelledImages(torch.zeros(20, 3, 1, 1), torch.arange(20) % 10, 10)
    relabelled = as_imagenet32(data)
    assert relabelled.num_classes == 1000
    assert relabelled.labels.tolist() == [match.label - 1 for match in MATCHES] * 2
    with refuses("CIFAR-10 has 10 classes, these images 1000"):
        as_imagenet32(relabelled)


def map_file(changes: dict[str, str] = {}) -> str:  # noqa: B006
    """Make a file like ILSVRC's map_clsloc.txt: real ids for the matching classes, made-up ones for the others."""
    ids = {label: f"n9{label:07}" for label in range(1, 1001)} | {match.label: match.wordnet for match in MATCHES}
    text = "".join(f"{wordnet} {label} name_{label}\n" for label, wordnet in ids.items())
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    return text


def test_other_classes_are_chosen_by_label_or_with_the_map_by_wordnet_id(tmp_path):
    written = write_imagenet32(tmp_path)
    pixels, labels = joined(written, "train")
    for classes in ([1000, 274], [1000, "n04285008"]):
        data = imagenet32(tmp_path, classes=classes)
        assert data.num_classes == 2
        assert data.labels.tolist() == [[1000, 274].index(y) for y in labels if y in (1000, 274)]
    with refuses(r"no class of ImageNet has the WordNet id 'n90001000'; .* need map_clsloc\.txt in"):
        imagenet32(tmp_path, classes=["n90001000"])
    (tmp_path / "map_clsloc.txt").write_text(map_file())
    assert len(imagenet32(tmp_path, classes=["n90001000"])) == (labels == 1000).sum()
    with refuses("no class of ImageNet has the WordNet id 'airliner'$"):
        imagenet32(tmp_path, classes=["airliner"])


@pytest.mark.parametrize("classes", [[0], [1001], [5, 5], [], ["n04285008", 274]])
def test_impossible_classes_are_refused(tmp_path, classes):
    with refuses(r"labels must lie in 1 \.\. 1000|classes must be different ones, at least one, not \["):
        imagenet32(tmp_path, classes=classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n02690373 230": "n02690373 231", "n90000231 231": "n90000231 230"}, r"\(airliner\) label 231, not 230"),
        ({"n90000001 1 ": "n90000001 2 "}, r"must give each of the labels 1 \.\. 1000 to one WordNet id"),
        ({"n90000001 1 ": "n90000001 one "}, 'lines must be like "n02119789 1 kit_fox"'),
        ({"n02690373 ": "n12345678 "}, r"gives n02690373 \(airliner\) label no, not 230"),
    ],
)
def test_a_map_in_another_order_is_refused(tmp_path, changes, message):
    write_imagenet32(tmp_path)
    (tmp_path / "map_clsloc.txt").write_text(map_file(changes))
    with refuses(message) as caught:
        imagenet10(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'map_clsloc.txt'}: ")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"data": GOOD_PIXELS, "labels": np.arange(TRAIN)},
            r"labels must lie in 1 \.\. 1000; 1 of 12 values do not: 0",
        ),
        ({"data": GOOD_PIXELS, "labels": np.array(["x"] * TRAIN, object)}, "pickled objects are refused"),
        ({"data": some_bytes(TRAIN, 64 * 64 * 3), "labels": GOOD_LABELS}, r"not uint8 \[12, 12288\]"),
        ({"data": GOOD_PIXELS}, r"no array labels; it has \['data'\]"),
    ],
)
def test_what_is_wrong_with_an_npz_batch_is_said(tmp_path, batch, message):
    write_imagenet32(tmp_path)
    np.savez(tmp_path / "train_data_batch_7.npz", **batch)
    with refuses(message) as caught:
        imagenet32(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'train_data_batch_7.npz'}: ")


@pytest.mark.parametrize(("count", "found"), [(TRAIN - 1, 119), (TRAIN + 1, 121)])
def test_another_number_of_images_than_imagenet_has_is_refused(tmp_path, count, found):
    write_imagenet32(tmp_path)
    np.savez(tmp_path / "train_data_batch_10.npz", data=some_bytes(count, 3072), labels=[5] * count)
    with refuses(f"{found} images, not the 120 published"):
        imagenet32(tmp_path)
    with refuses(f"{found} images, not the 120 published"):
        imagenet10(tmp_path)


def test_all_files_are_there_before_the_first_is_read(tmp_path, monkeypatch):
    write_imagenet32(tmp_path)
    (tmp_path / "train_data_batch_10.npz").unlink()
    monkeypatch.setattr(IMAGENET32, "read_batch", lambda path: pytest.fail("read"))
    with refuses(r"no train_data_batch_10\.npz or train_data_batch_10; it holds", FileNotFoundError):
        imagenet32(tmp_path)


# --- parts of published sets


def test_a_part_is_read_where_it_is_enough_and_said(tmp_path):
    write_everything(tmp_path)
    (tmp_path / "cifar10" / "data_batch_2").unlink()
    for name in ("imagenet32", "imagenet10"):
        for number in range(2, 11):
            (tmp_path / name / f"train_data_batch_{number}.npz").unlink()
    images, labels = MNIST.FILES["train"]
    (tmp_path / "mnist" / images).write_bytes(idx(some_bytes(5, 28, 28)))
    (tmp_path / "mnist" / labels).write_bytes(idx(np.arange(5, dtype=np.uint8)))
    savemat(tmp_path / "svhn" / SVHN.FILES["train"], {"X": some_bytes(32, 32, 3, 5), "y": np.full((5, 1), 3, np.uint8)})
    most = {"mnist": 5, "svhn": 5, "cifar10": 4 * TRAIN, "imagenet32": TRAIN, "imagenet10": TRAIN}
    for name, count in most.items():
        with pytest.raises((ValueError, FileNotFoundError)):
            open_dataset(name, tmp_path / name)
        with pytest.warns(UserWarning, match="a part of the published set|of the [0-9]+ published images"):
            found = open_dataset(name, tmp_path / name, partial=True)
        assert len(found) == count or name == "imagenet10" and len(found) < count
    with refuses("no data_batch_1", FileNotFoundError):
        open_dataset("cifar10", tmp_path / "mnist", partial=True)


# --- images kept as bytes


def test_bytes_read_like_the_floats_that_they_stand_for():
    pixels = torch.from_numpy(some_bytes(9, 3, 4, 5))
    images, floats = ByteImages(pixels), pixels.float() / 127.5 - 1
    assert (len(images), images.shape, images.ndim, images.dtype) == (9, floats.shape, 4, floats.dtype)
    for index in (3, slice(2, 5), torch.tensor([4, 4, 0]), torch.arange(9) % 2 == 0, slice(0, 0)):
        assert torch.equal(images[index], floats[index])
    assert torch.equal(images.to("cpu"), floats)
    assert [torch.equal(a[:], b) for a, b in zip(images.split(4), floats.split(4), strict=True)] == [True] * 3
    with refuses("pixels must be uint8, not torch.float32"):
        ByteImages(floats)


def test_labelled_bytes_stay_bytes_until_they_are_read(tmp_path):
    pixels = torch.from_numpy(some_bytes(9, 3, 4, 5))
    data = LabelledImages(ByteImages(pixels), torch.arange(9), 9)
    picked = data[torch.tensor([8, 1])]
    assert torch.equal(picked.images.pixels, pixels[[8, 1]]) and picked.labels.tolist() == [8, 1]
    for uint8 in (False, True):
        data.save_npz(tmp_path / "a.npz", uint8=uint8)
        assert torch.equal(load_npz(tmp_path / "a.npz").images, data.images[:])
        assert np.load(tmp_path / "a.npz")["images"].dtype == np.uint8
    with refuses(r"labels must lie in 0 \.\. 7"):
        LabelledImages(data.images, data.labels, 8)
    with refuses(r"C in \(1, 3\), not \[9, 2, 4, 5\]"):
        LabelledImages(ByteImages(pixels[:, :2]), data.labels, 9)


def test_training_on_bytes_is_training_on_floats():
    pixels = torch.from_numpy(some_bytes(20, 1, 8, 8))
    data = LabelledImages(ByteImages(pixels), torch.arange(20) % 10, 10)
    floats = LabelledImages(data.images[:], data.labels, 10)
    config = UNetConfig(8, in_channels=1, width=8, multipliers=(1, 2), blocks_per_level=1, norm_groups=8)
    found = []
    for images in (data, floats):
        torch.manual_seed(0)
        model = pretrain(UNet(config), images, PublicTraining(steps=2, batch_size=4), progress=False)
        judge = train_classifier(images, steps=2, batch_size=4, width=8, progress=False)
        found.append(
            [*model.state_dict().values(), *judge.state_dict().values(), torch.tensor(accuracy(judge, images))]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- a folder of images


def write_folder(root: Path, images: dict[str, np.ndarray]) -> Path:
    for name, pixels in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


def test_a_folder_comes_back_with_its_classes_sorted(tmp_path):
    images = {
        f"{c}/{i}{end}": some_bytes(6, 5, 3) for c in ("dog", "cat") for i, end in enumerate((".png", ".BMP", ".tif"))
    }
    write_folder(tmp_path, images | {"cat/more/x.ppm": some_bytes(6, 5, 3), ".hidden/x.png": some_bytes(1, 1)})
    data = image_folder(tmp_path)
    assert class_names(tmp_path) == ["cat", "dog"]
    assert data.images.shape == (7, 3, 6, 5) and data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1] and data.num_classes == 2
    dogs = as_bytes(data.images)[4:].transpose(0, 2, 3, 1)
    assert np.array_equal(dogs, np.stack([images[f"dog/{name}"] for name in ("0.png", "1.BMP", "2.tif")]))


def test_grey_images_stay_grey_unless_one_is_in_colour(tmp_path):
    grey, colour = some_bytes(4, 4), some_bytes(4, 4, 3)
    write_folder(tmp_path, {"a/1.png": grey, "b/2.png": grey})
    assert np.array_equal(as_bytes(image_folder(tmp_path).images), np.stack([grey, grey])[:, None])
    write_folder(tmp_path, {"b/3.png": colour})
    images = as_bytes(image_folder(tmp_path).images)
    assert np.array_equal(images[0], np.stack([grey] * 3)) and np.array_equal(images[2], colour.transpose(2, 0, 1))


def test_images_are_cut_to_the_middle_and_resized(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the central square
    write_folder(tmp_path, {"a/1.png": wide, "a/2.png": wide.transpose(1, 0, 2), "a/3.png": some_bytes(9, 9, 3)})
    with refuses(r"2\.png: 8 x 16 pixels, but .*1\.png has 16 x 8; give a size to resize them all to"):
        image_folder(tmp_path)
    images = image_folder(tmp_path, size=4).images
    assert images.shape == (3, 3, 4, 4) and (as_bytes(images[:2]) == 200).all()
    with refuses("size must be at least 1, not 0"):
        image_folder(tmp_path, size=0)


def test_transparent_is_white_and_turned_photographs_are_turned_back(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a" / "1.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "a" / "2.png")
    palette = Image.new("P", (2, 2))
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / "a" / "3.png", transparency=0)
    assert (image_folder(tmp_path).images == 1).all()
    (tmp_path / "a" / "1.png").unlink(), (tmp_path / "a" / "3.png").unlink()
    assert image_folder(tmp_path).images.shape == (1, 1, 2, 2)

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = write_folder(tmp_path / "photographs", {"a/other.png": some_bytes(6, 4, 3)})
    Image.fromarray(some_bytes(4, 6, 3)).save(turned / "a" / "1.jpg", exif=exif)
    assert image_folder(turned).images.shape == (2, 3, 6, 4)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40), "half"])
def test_a_corrupt_image_is_named(tmp_path, content):
    write_folder(tmp_path, {"a/1.png": some_bytes(32, 32, 3), "b/2.png": some_bytes(32, 32, 3)})
    path = tmp_path / "b" / "2.png"
    path.write_bytes(path.read_bytes()[:1000] if content == "half" else content)
    with pytest.raises(ValueError) as caught:
        image_folder(tmp_path)
    assert f"\n{path}: " in str(caught.value)


def test_all_unreadable_images_are_named_at_once_and_can_be_left_out(tmp_path):
    write_folder(tmp_path, {f"{c}/{i}.png": some_bytes(9, 9, 3) for c in "ab" for i in range(3)})
    broken = [tmp_path / "a" / "0.png", tmp_path / "b" / "1.png", tmp_path / "b" / "2.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError) as caught:
        image_folder(tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert "3 of 6 images can't be read" in first and "--skip-unreadable" in first
    assert [line.split(": ")[0] for line in lines] == list(map(str, broken))
    with pytest.warns(UserWarning, match="left out 3 of 6 images"):
        read = image_folder(tmp_path, skip_unreadable=True)
    assert read.labels.tolist() == [0, 0, 1] and read.class_names == ("a", "b")
    kept = [tmp_path / name for name in ("a/1.png", "a/2.png", "b/0.png")]
    assert list(read.files) == kept and read[torch.tensor([2, 0])].files == (kept[2], kept[0])
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 4"), refuses("b: none of its images can be read"):
        image_folder(tmp_path, skip_unreadable=True)


def test_headers_tell_what_a_folder_holds(tmp_path):
    write_folder(
        tmp_path, {"a/1.png": some_bytes(40, 48), "a/2.png": some_bytes(40, 48), "b/1.png": some_bytes(64, 33)}
    )
    (tmp_path / "b" / "2.png").write_bytes(b"nothing")
    facts = look_at(tmp_path)
    assert facts == FolderFacts(("a", "b"), 4, {(48, 40): 2, (33, 64): 1}, 1) and facts.smallest_side == 33
    assert sensible_size(facts) == 32
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(some_bytes(20, 70, 3)).save(tmp_path / "a" / "3.jpg", exif=exif)
    assert (20, 70) in look_at(tmp_path).sizes and look_at(tmp_path).channels == 3
    with pytest.warns(UserWarning, match="left out 1 of 5"):
        assert open_public(str(tmp_path), skip_unreadable=True).images.shape == (4, 3, 16, 16)


def test_names_of_classes_are_one_in_any_form_of_unicode(tmp_path):
    write_folder(tmp_path, {"ce\u0301ll/1.png": some_bytes(4, 4) | 128})
    assert image_folder(tmp_path).class_names == ("c\u00e9ll",)


def test_more_than_8_bits_and_decompression_bombs_are_refused(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a/1.png": np.full((4, 4), 3000, np.uint16)})
    with refuses(r"1\.png: of mode I;16: only images of 8 bits a channel are read"):
        image_folder(tmp_path)
    write_folder(tmp_path, {"a/1.png": some_bytes(9, 9)})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with refuses(r"1\.png: .*decompression bomb"):
        image_folder(tmp_path)


def test_a_folder_that_is_none_says_what_to_put_there(tmp_path):
    with refuses("none: no such folder. A folder of images: one subfolder for each class", FileNotFoundError):
        image_folder(tmp_path / "none")
    with refuses("no subfolders. A folder of images", FileNotFoundError):
        image_folder(tmp_path)
    write_folder(tmp_path, {"a/1.png": some_bytes(2, 2) | 128})
    (tmp_path / "b").mkdir()
    with refuses("b: no images. A folder of images", FileNotFoundError):
        image_folder(tmp_path)
    write_folder(tmp_path, {"b/1.png": some_bytes(2, 2)})
    (tmp_path / "b" / "photo.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"b: left out 1 files that are no images by their names: photo\.heic"):
        assert len(image_folder(tmp_path)) == 2


@pytest.mark.parametrize(
    "files",
    [
        ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"],
        ["train/1.png", "test/1.png"],
        ["Train/cat/1.png", "val/cat/1.png", "Test/cat/1.png"],
        ["validation/cat/1.png"],
        ["train_set/cat/1.png", "test-set/cat/1.png"],
        ["train2017/1.png", "val2017/1.png"],
        ["TrainImages/1.png", "testimages/1.png"],
        ["train/cat/1.png", "val/cat/1.png", "unlabelled/1.png"],
    ],
)
def test_the_parts_of_a_data_set_are_no_classes(tmp_path, files):
    write_folder(tmp_path, {name: some_bytes(9, 9) for name in files})
    first = sorted({name.split("/")[0] for name in files})[0]
    with refuses(f"are parts of a data set by their names, not classes: give one of them, as .*{first}"):
        image_folder(tmp_path)
    if files[0].count("/") == 2:  # the remedy
        assert image_folder(tmp_path / first).num_classes == len(
            {n.split("/")[1] for n in files if n.startswith(first)}
        )


@pytest.mark.parametrize(
    "files",
    [
        ["train/1.png", "bus/1.png"],
        ["trains/1.png", "valley/1.png"],
        ["test_set/1.png", "bus/1.png"],
        ["a/test/1.png", "b/1.png"],
        ["a/1.png"],
        ["a/x/1.png", "b/y/1.png"],
    ],
)
def test_classes_that_look_a_little_like_parts_are_classes(tmp_path, files):
    write_folder(tmp_path, {name: some_bytes(9, 9) for name in files})
    assert image_folder(tmp_path).num_classes == len(files)


def test_a_folder_above_the_classes_is_not_the_only_class(tmp_path):
    write_folder(tmp_path, {"images/cat/1.png": some_bytes(9, 9), "images/dog/1.png": some_bytes(9, 9)})
    with refuses(
        "images would be the only class, but it holds no images itself, and the folders cat, dog: give .*images if"
    ):
        image_folder(tmp_path)
    assert class_names(tmp_path / "images") == ["cat", "dog"]


def test_images_beside_the_classes_are_not_left_out_silently(tmp_path):
    write_folder(
        tmp_path, {"a/1.png": some_bytes(9, 9), "stray.png": some_bytes(9, 9), ".hidden.png": some_bytes(9, 9)}
    )
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match=r"left out 2 images that are in no class's folder: gone\.png, stray\.png"):
        assert len(image_folder(tmp_path)) == 1


def test_linked_folders_and_files_are_read_like_others_but_nothing_twice(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write_folder(elsewhere, {f"{name}/{i}.png": some_bytes(9, 9) for name in "ab" for i in range(2)})
    write_folder(root, {"cat/own.png": some_bytes(9, 9)})
    (root / "cat" / "linked").symlink_to(elsewhere / "a")
    (root / "dog").symlink_to(elsewhere / "b")
    assert image_folder(root).labels.tolist() == [0, 0, 0, 1, 1]
    again = root / "dog" / "again"
    for target in (elsewhere / "a" / "0.png", elsewhere / "a"):
        again.unlink(missing_ok=True)
        (again := root / "dog" / ("again.png" if target.suffix else "again")).symlink_to(target)
        with refuses("are one file, by a link: a record may be there once"):
            image_folder(root)
    again.unlink()
    again.symlink_to(root / "dog")
    (root / "dog" / "again.png").unlink(missing_ok=True)
    with refuses("is a link to a folder that it is in"):
        image_folder(root)
    again.unlink()
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with refuses(r"gone\.png: "):
        image_folder(root)


def test_two_hard_links_are_one_record(tmp_path):
    write_folder(tmp_path, {"a/1.png": some_bytes(9, 9), "b/1.png": some_bytes(9, 9)})
    os.link(tmp_path / "a" / "1.png", tmp_path / "b" / "2.png")
    with refuses("are one file, by a link: a record may be there once"):
        image_folder(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    write_folder(tmp_path, {"a/1.png": some_bytes(9, 9)})
    os.mkfifo(tmp_path / "a" / "2.png")
    with refuses(r"2\.png: no file that could be read, but a pipe or a device"):
        image_folder(tmp_path)


def test_an_image_is_read_by_no_other_program(tmp_path, monkeypatch):
    """PIL would call Ghostscript for EPS, whatever the file is called."""
    (tmp_path / "a").mkdir()
    Image.fromarray(some_bytes(9, 9, 3)).save(tmp_path / "a" / "1.png", format="EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was called"))
    with refuses(r"1\.png: cannot identify image file"):
        image_folder(tmp_path)


def test_hidden_folders_inside_a_class_stay_hidden(tmp_path):
    write_folder(tmp_path, {"a/1.png": some_bytes(9, 9), "a/.cache/2.png": some_bytes(9, 9)})
    assert len(image_folder(tmp_path)) == 1


def test_masks_in_a_folder_are_not_read_as_black(tmp_path):
    write_folder(tmp_path, {"a/1.png": np.eye(4, dtype=np.uint8), "b/1.png": np.zeros((4, 4), np.uint8)})
    with refuses(r"images are bytes of at most 1, .*Save white as 255, or give the images as an npz .* range=\[0, 1\]"):
        image_folder(tmp_path)


# --- subsets


def test_one_percent_of_cifar10_is_50_images_a_class():
    labels = torch.randperm(50_000) % 10
    data = LabelledImages(torch.zeros(50_000, 1, 1, 1), labels, 10)
    subset = stratified_subset(data, fraction=0.01)
    assert len(subset) == 500 and subset.labels.bincount().tolist() == [50] * 10 and subset.num_classes == 10


def numbered(labels: torch.Tensor, num_classes: int) -> LabelledImages:
    """Make images whose pixels hold the image's position."""
    return LabelledImages(torch.arange(len(labels)).float().view(-1, 1, 1, 1) / 1000, labels, num_classes)


@settings(deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), share=st.floats(0.001, 1), seed=st.integers(0, 9))
def test_a_subset_has_each_class_in_proportion_and_each_image_once(sizes, share, seed):
    total = sum(sizes)
    count = max(1, round(share * total))
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(total, generator=torch.Generator().manual_seed(seed))]
    data = numbered(labels, len(sizes))
    if not total:
        with refuses("of 0 images are no subset"):
            stratified_subset(data, count=count, seed=seed)
        return
    subset = stratified_subset(data, count=count, seed=seed)
    places = (subset.images.flatten() * 1000).round().long()
    assert len(subset) == count and (places.diff() > 0).all()  # in order, each once
    assert torch.equal(subset.labels, labels[places])
    counts = subset.labels.bincount(minlength=len(sizes))
    assert all(abs(counts[y] - size * count / total) < 1 for y, size in enumerate(sizes))
    again = stratified_subset(data, count=count, seed=seed)
    assert torch.equal(again.images, subset.images)


def test_a_subset_is_random_and_its_seed_decides():
    data = numbered(torch.zeros(1000).long(), 1)
    first, second = (stratified_subset(data, count=100, seed=seed).images.flatten() for seed in (0, 1))
    assert not torch.equal(first, second)
    assert 0.4 < first.mean() < 0.6  # from the whole set


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give count or fraction"),
        ({"count": 1, "fraction": 0.5}, "give count or fraction, not count=1 and fraction=0.5"),
        ({"count": 0}, "0 of 30 images are no subset"),
        ({"count": 31}, "31 of 30 images are no subset"),
        ({"fraction": 0.001}, "0 of 30 images"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\], not 0.0"),
        ({"fraction": 1.5}, "not 1.5"),
        ({"fraction": float("nan")}, "not nan"),
    ],
)
def test_no_subset_is_refused(options, message):
    with refuses(message):
        stratified_subset(numbered(torch.arange(30) % 3, 3), **options)


# --- the colour pair


def test_the_colour_digits_are_the_digits_in_their_fixed_split():
    for colours, grey in zip(colour_digits_split(), digits_split(), strict=True):
        assert colours.images.shape == (len(grey), 3, 32, 32) and torch.equal(colours.labels, grey.labels)
        ink = torch.nn.functional.interpolate(grey.images, size=(32, 32), mode="bicubic").squeeze(1)
        luma = torch.einsum("nchw,c->nhw", colours.images, torch.tensor([0.299, 0.587, 0.114]))
        written, ground = ink > 0.5, ink < -0.5
        light_ink = torch.stack(
            [x[on].mean() > x[off].mean() for x, on, off in zip(luma, written, ground, strict=True)]
        )
        assert 0.4 < light_ink.float().mean() < 0.6
        # Where the ink is certain, all its pixels are on one side of the middle, and those of the ground on the other.
        sides = torch.where(light_ink[:, None, None], luma, -luma)
        assert (sides[written] > 0).all() and (sides[ground] < 0).all()
    first, second = colour_digits_split()[0], colour_digits_split()[0]
    assert torch.equal(first.images, second.images)


def test_the_public_colours_are_made_the_same_way_and_determined_by_the_seed():
    data, grey = colour_font_digits(300, seed=3), font_digits(300, seed=3)
    assert data.images.shape == (300, 3, 32, 32) and torch.equal(data.labels, grey.labels)
    torch.manual_seed(77)
    assert torch.equal(colour_font_digits(300, seed=3).images, data.images)
    assert not torch.equal(colour_font_digits(300, seed=4).images, data.images)
    private = colour_digits_split()[0].images
    for statistic in (lambda x: x.mean(dim=(0, 2, 3)), lambda x: x.std(dim=(0, 2, 3))):
        torch.testing.assert_close(statistic(data.images), statistic(private), atol=0.06, rtol=0)
    assert len(data.images[:, :, 0, 0].unique(dim=0)) == 300  # each has its own ground


@pytest.mark.parametrize("seed", [0, 1, 77])
def test_the_colours_come_from_other_numbers_than_the_glyphs(monkeypatch, seed):
    module, seeds = importlib.import_module("fastloda.synthesis.data.colour_digits"), []
    paint = module._paint
    monkeypatch.setattr(module, "_paint", lambda digits, seed: seeds.append(seed) or paint(digits, seed))
    colour_font_digits(3, seed)
    colours, glyphs = (torch.rand(9, generator=torch.Generator().manual_seed(s)) for s in (seeds[0], seed))
    assert not torch.equal(colours, glyphs)  # a generator may use only 32 bits of its seed


def test_the_colours_say_nothing_of_the_digit():
    """A linear classifier of corner colours is no better than chance, because colours are drawn independently of labels."""
    data = colour_font_digits(2000, seed=0)
    corners = data.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].flatten(1)
    features = torch.cat([corners, torch.ones(2000, 1)], dim=1)
    targets = torch.nn.functional.one_hot(data.labels, 10).float()
    weights = torch.linalg.lstsq(features[:1000], targets[:1000]).solution
    right = ((features[1000:] @ weights).argmax(dim=1) == data.labels[1000:]).float().mean()
    assert right < 0.15


# --- the catalogue


def write_everything(root: Path) -> None:
    write_mnist(root / "mnist"), write_cifar10(root / "cifar10"), write_svhn(root / "svhn")
    write_imagenet32(root / "imagenet32"), write_imagenet32(root / "imagenet10")


def test_the_papers_table_runs_on_published_files(tmp_path):
    """CIFAR-10's pickles and ImageNet32's npz batches, in one folder, give a finished table."""
    root = tmp_path / "data"
    write_cifar10(root / "cifar-10-batches-py"), write_imagenet32(root / "Imagenet32_train_npz")
    (root / "cifar-10-batches-py" / "data_batch_5").unlink()
    command = f"reproduce table2 --data {root} --run {tmp_path / 'run'} --quick --seeds 1 --epsilons 10 --jobs 1"
    command += " --device cpu --progress false"
    assert main([*command.split(), "--methods", "DP-LoDA"]) == 2
    assert main([*command.split(), "--allow_partial", "--methods", "DP-LoDA"]) == 0
    text = (tmp_path / "run" / "results.md").read_text()
    assert "| DP-LoDA | its samples | " in text and "48 images" in text and "(63.5)" in text


SHAPES = {
    "digits": (1, 8, 8),
    "font-digits": (1, 8, 8),
    "mnist5k": (1, 28, 28),
    "font-digits-28": (1, 28, 28),
    "font-styles": (1, 8, 8),
    "font-styles-28": (1, 28, 28),
    "colour-digits": (3, 32, 32),
    "colour-font-digits": (3, 32, 32),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "svhn": (3, 32, 32),
    "imagenet32": (3, 32, 32),
    "imagenet10": (3, 32, 32),
}


def test_every_name_opens_in_both_channels_and_splits(tmp_path):
    write_everything(tmp_path)
    assert set(SHAPES) == set(NAMES)
    for name, shape in SHAPES.items():
        root = tmp_path / name if (tmp_path / name).exists() else None
        data = open_dataset(name, root, count=20)
        assert tuple(data.images.shape[1:]) == shape, name
        for channels in (1, 3):
            assert open_dataset(name, root, count=20, channels=channels).images.shape[1:] == (channels, *shape[1:])
        if "font" in name:
            with refuses(f"{name} has no test part"):
                open_dataset(name, root, "test")
        else:
            assert len(open_dataset(name, root, "test")) != len(data)


def test_mnist5k_is_4000_private_and_1000_test_digits_of_mnist():
    private, test = mnist5k_split()
    assert private.labels.bincount().tolist() == [400] * 10 and test.labels.bincount().tolist() == [100] * 10
    rows = torch.cat([private.images, test.images]).flatten(1)
    assert len(rows.unique(dim=0)) == 5000 and rows.min() == -1 and rows.max() == 1
    border = torch.ones(28, 28, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (private.images[..., border] == -1).float().mean() > 0.99  # 20 x 20 pixels, centred by the centre of mass


@pytest.mark.parametrize("draw", [font_digits_as_mnist, font_styles_as_mnist])
def test_font_digits_are_placed_as_mnist_s_are(draw):
    ink = draw(200, seed=0).images[:, 0] + 1
    extent = torch.stack([(ink > 0.5).any(axis).sum(1) for axis in (1, 2)]).amax(0)
    assert 19.5 < extent.float().mean() < 21.5  # the bend moves each one's edges by some pixels
    for axis in (1, 2):
        centre = (ink.sum(axis) * torch.arange(28)).sum(1) / ink.sum((1, 2))
        assert (centre - 13.5).abs().max() <= 0.51


@pytest.mark.parametrize("side", [5, 8])
def test_ink_is_centred_by_whole_pixels(side):
    images = torch.full((4, 3, side, side), -1.0)
    for image, (row, column) in zip(images, [(0, 0), (1, 3), (side - 2, 2)]):  # the last has no ink
        image[:, row : row + 2, column] = 1
    found = centred_by_ink(images)
    assert torch.equal(found[3], images[3])
    for image in found[:3]:
        assert (image == 1).sum() == 6 and (image == -1).sum() == 3 * (side**2 - 2)
        centre = ((image[0] == 1).nonzero() - (side - 1) / 2).mean(0, dtype=torch.float32)
        assert centre.abs().max() <= 0.5


def test_font_styles_are_the_same_images_in_finer_classes():
    plain, styles = font_digits(300, seed=4, size=16), font_styles(300, seed=4, size=16)
    assert torch.equal(plain.images, styles.images) and styles.num_classes == 160 == len(styles.class_names)
    names = [styles.class_names[label] for label in styles.labels.tolist()]
    assert [int(name[0]) for name in names] == plain.labels.tolist()

    def width(kind: str) -> torch.Tensor:
        inks = [image[0] > 0 for image, name in zip(styles.images, names) if name.endswith(kind)]
        return torch.stack([ink.any(0).sum() / ink.any(1).sum().clamp(min=1) for ink in inks]).mean()

    assert width("wide") > 1.2 * width("narrow")


def test_sizes_are_given_where_they_can_be(tmp_path):
    write_everything(tmp_path)
    write_folder(tmp_path / "folder", {"a/1.png": some_bytes(7, 9), "b/2.png": some_bytes(9, 7)})
    assert open_dataset("font-digits", count=3, size=13).images.shape == (3, 1, 13, 13)
    assert open_dataset("mnist", tmp_path / "mnist", size=32).images.shape == (TRAIN, 1, 32, 32)
    assert open_dataset("mnist", tmp_path / "mnist", size=8).images.shape == (TRAIN, 1, 28, 28)
    assert open_dataset(tmp_path / "folder", size=6).images.shape == (2, 1, 6, 6)


def test_colours_become_their_luma_and_grey_is_repeated(tmp_path):
    pixels = np.array([[[[255]], [[0]], [[0]]], [[[0]], [[255]], [[0]]], [[[255]], [[255]], [[255]]]], np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=[0, 1, 2])
    grey = open_dataset(tmp_path / "a.npz", channels=1).images.flatten()
    torch.testing.assert_close(grey, 2 * torch.tensor([0.299, 0.587, 1.0]) - 1)
    grey = open_dataset("digits").images
    assert torch.equal(open_dataset("digits", channels=3).images, torch.cat([grey] * 3, dim=1))


@pytest.mark.parametrize(
    ("arguments", "options", "message", "error"),
    [
        (
            ["mnist"],
            {},
            "mnist is read from a local folder: say which. MNIST: put train-images-idx3-ubyte, ",
            ValueError,
        ),
        (["mnist", "none"], {}, "none: no such folder. MNIST: put train-images-idx3-ubyte, ", FileNotFoundError),
        (
            ["cifar11"],
            {},
            "data must be one of digits, font-digits, .*, imagenet10, a folder of images or an",
            ValueError,
        ),
        (["digits", "."], {}, "digits needs no folder, but . is given", ValueError),
        (["digits", None, "val"], {}, "split must be train or test, not 'val'", ValueError),
        (["mnist"], {"size": 0}, "size must be at least 1, not 0", ValueError),
        (["digits"], {"channels": 4}, "channels must be 1 or 3, not 4", ValueError),
        (["digits"], {"num_classes": 9}, "digits has 10 classes, more than the 9 expected", ValueError),
        (["none.npz"], {}, "none.npz: no such file", FileNotFoundError),
        (["{folder}", None, "test"], {}, "is one split in one place: give the path of the test images", ValueError),
        (["{folder}", "."], {}, "is one split in one place", ValueError),
        (["{folder}"], {}, "no subfolders. A folder of images", FileNotFoundError),
        (["{empty}"], {}, "holds no images", ValueError),
    ],
)
def test_what_cannot_be_opened_is_said(tmp_path, arguments, options, message, error):
    np.savez(tmp_path / "empty.npz", images=np.zeros((0, 1, 2, 2)), labels=np.zeros(0, int))
    (tmp_path / "folder").mkdir()
    places = {"folder": tmp_path / "folder", "empty": tmp_path / "empty.npz"}
    with refuses(message, error):
        open_dataset(*(a.format(**places) if a else a for a in arguments), **options)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "imagenet32"])
def test_a_missing_file_is_named_with_what_is_there_instead(tmp_path, name):
    (tmp_path / "holiday.txt").write_text("")
    for split in ("train", "test"):
        with refuses("it holds holiday.txt", FileNotFoundError) as caught:
            open_dataset(name, tmp_path, split)
        message = str(caught.value)
        assert "\n" not in message and describe(name) in message and len(message) - len(str(tmp_path)) < 600


def test_the_description_names_every_file():
    files = {
        "mnist": [*MNIST.FILES["train"], *MNIST.FILES["test"]],
        "svhn": SVHN.FILES.values(),
        "cifar10": ["data_batch_1", "data_batch_5", "test_batch", ".bin"],
        "imagenet32": ["train_data_batch_1.npz", "train_data_batch_10.npz", "val_data.npz", "map_clsloc.txt"],
    }
    for name, expected in files.items():
        assert all(file in describe(name) for file in expected)
    assert all(f"{name}: {describe(name)}" in describe() for name in NAMES)
    with refuses("no data set 'cifar'"):
        describe("cifar")


def test_every_private_set_has_a_public_partner_of_as_many_classes(tmp_path):
    write_everything(tmp_path)
    assert PUBLIC_PARTNERS["mnist"] == "svhn" and PUBLIC_PARTNERS["cifar10"] == "imagenet32"
    assert {*PUBLIC_PARTNERS, *PUBLIC_PARTNERS.values()} <= set(NAMES)
    for private, public in PUBLIC_PARTNERS.items():
        size = 32 if private == "mnist" else None
        data, partner = (
            open_dataset(name, root if (root := tmp_path / name).exists() else None, count=20, channels=3, size=size)
            for name in (private, public)
        )
        assert data.num_classes <= partner.num_classes and data.images.shape[1:] == partner.images.shape[1:]


# --- the command line's names


def test_names_of_the_command_line(tmp_path):
    write_everything(tmp_path)
    assert len(open_images(f"mnist:{tmp_path / 'mnist'}")) == TRAIN
    assert len(open_images(f"mnist-test:{tmp_path / 'mnist'}")) == TEST
    assert len(open_images(f"cifar10@10%:{tmp_path / 'cifar10'}")) == round(0.5 * TRAIN)
    assert len(open_images(f"cifar10-test@3:{tmp_path / 'cifar10'}")) == 3
    assert len(open_images("digits-test")) == 360 and len(open_images("digits@143")) == 143
    assert len(open_images("digits@0.5%")) == 7
    assert open_images("font-digits", count=11, seed=2).images.shape == (11, 1, 8, 8)
    assert NAMED == {
        "digits",
        "digits-test",
        "font-digits",
        "mnist5k",
        "mnist5k-test",
        "font-digits-28",
        "font-styles",
        "font-styles-28",
        "colour-digits",
        "colour-digits-test",
        "colour-font-digits",
    }
    for name in ("digits@", "digits@x", "digits@1.5", "font-digits-train", "mnist@5%%"):
        with refuses("data must be one of digits"):
            open_images(name)
    with refuses("needs no folder"):
        open_images("digits:.")


def test_full_names_are_the_same_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert full_name("digits@5") == "digits@5" and full_name("a.npz") == str(tmp_path / "a.npz")
    assert full_name("mnist-test@5%:data/m") == f"mnist-test@5%:{tmp_path / 'data' / 'm'}"
    (tmp_path / "folder").mkdir()
    assert (
        files_of("a.npz") == (Path("a.npz"),)
        and files_of("mnist:x") == files_of("digits@5") == files_of("folder") == ()
    )


def test_a_u_net_of_colour_images_takes_grey_ones_and_not_the_other_way(tmp_path):
    write_everything(tmp_path)
    colour = UNetConfig(in_channels=3, image_size=32, num_classes=10)
    mnist_images = open_for_unet(f"mnist:{tmp_path / 'mnist'}", colour)
    assert mnist_images.images.shape == (TRAIN, 3, 32, 32)
    assert open_for_unet("colour-font-digits", colour, count=5).images.shape == (5, 3, 32, 32)
    assert isinstance(open_for_unet(f"imagenet10:{tmp_path / 'imagenet10'}", colour).images, ByteImages)
    with refuses("3 x 32 x 32, the U-Net is for 1 x 32 x 32"):
        open_for_unet("colour-digits", UNetConfig(in_channels=1, image_size=32, num_classes=10))
    assert open_for_unet(f"imagenet32:{tmp_path / 'imagenet32'}", colour).num_classes == 1000
    assert open_tests(f"mnist-test:{tmp_path / 'mnist'}", mnist_images).images.shape == (TEST, 3, 32, 32)
    with refuses("the training images are of 1 x 8 x 8, colour-digits of 3 x 32 x 32"):
        open_tests("colour-digits", open_images("digits"))


def test_reading_never_imports_what_a_pickle_names(tmp_path):
    """A mere lookup may run code, because importing a module runs it."""
    assert "antigravity" not in sys.modules
    reading_is_refused(tmp_path, b"cantigravity\nfly_genesis\n.", "would run antigravity.fly_genesis")
    assert "antigravity" not in sys.modules
