"""Data: which files are refused and with which words, npz files, the private split, and the font digits."""

import hashlib
import os
import re
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label
from sklearn.datasets import load_digits

from fastloda.synthesis.data import LabelledImages, digits_split, font_digits, font_styles, load_npz, named_classes
from fastloda.synthesis.data.font_digits import _box_to_glyph
from fastloda.synthesis.data.glyphs import CANVAS, DIGITS, FAMILIES, GLYPH, PRINTED, glyphs, handwritten
from fastloda.synthesis.data.images import MOST_CLASSES

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def fonts() -> LabelledImages:
    return font_digits(1003, seed=5)


def some_images(n: int = 4, channels: int = 1, side: int = 2, num_classes: int = 5) -> LabelledImages:
    generator = torch.Generator().manual_seed(n)
    images = 2 * torch.rand(n, channels, side, side, generator=generator) - 1
    return LabelledImages(images, torch.arange(n) % num_classes, num_classes)


# --- LabelledImages


GREY = torch.zeros(2, 1, 2, 2)
ONE_OF_EACH = torch.tensor([0, 1])


def pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "message"),
    [
        (GREY.double(), ONE_OF_EACH, 2, "not torch.float64 and torch.int64"),
        (GREY, ONE_OF_EACH.float(), 2, "not torch.float32 and torch.float32"),
        (torch.zeros(2, 2, 2), ONE_OF_EACH, 2, "not [2, 2, 2]"),
        (torch.zeros(2, 5, 2, 2), ONE_OF_EACH, 2, "C in (1, 3), not [2, 5, 2, 2]"),
        (GREY, torch.tensor([0, 1, 0]), 2, "labels must be of shape [2], one an image, not [3]"),
        (pixels(0, torch.nan), ONE_OF_EACH, 2, "finite; 1 of 2 values do not: nan"),
        (pixels(0, -torch.inf), ONE_OF_EACH, 2, "finite; 1 of 2 values do not: -inf"),
        (pixels(1.25, -3), ONE_OF_EACH, 2, "[-1, 1]; 2 of 2 values do not: 1.25, -3"),
        (GREY, torch.tensor([0, 2]), 2, "lie in 0 .. 1; 1 of 2 values do not: 2"),
        (GREY, torch.tensor([-1, 0]), 2, "lie in 0 .. 1; 1 of 2 values do not: -1"),
        (GREY[:0], ONE_OF_EACH[:0], 0, "num_classes must be 1 to 100,000, not 0"),
    ],
)
def test_broken_images_are_refused_with_the_offending_values(images, labels, num_classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LabelledImages(images, labels, num_classes)


def test_indexing_keeps_pairs_and_classes():
    data = some_images(6)
    for picked in (data[torch.tensor([4, 1, 1])], data[torch.arange(6) % 2 == 1], data[:2], data[:0]):
        assert picked.num_classes == data.num_classes
        assert len(picked) == len(picked.images) == len(picked.labels)
    picked = data[torch.tensor([4, 1, 1])]
    assert torch.equal(picked.images, torch.stack([data.images[i] for i in (4, 1, 1)]))
    assert picked.labels.tolist() == [4, 1, 1]


def test_is_immutable():
    with pytest.raises(AttributeError):
        some_images().labels = torch.zeros(4)


# --- npz


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_round_trip_is_exact(tmp_path, channels):
    data = some_images(channels=channels, side=3, num_classes=9)
    data.save_npz(tmp_path / "data")  # NumPy would append .npz to a path
    assert os.listdir(tmp_path) == ["data"]
    back = load_npz(tmp_path / "data")
    assert torch.equal(back.images, data.images) and torch.equal(back.labels, data.labels)
    assert back.num_classes == 9


def test_npz_uint8_rounds_to_the_nearest_and_then_stays(tmp_path):
    data = some_images(side=16)
    data.save_npz(tmp_path / "a.npz", uint8=True)
    once = load_npz(tmp_path / "a.npz")
    assert (once.images - data.images).abs().max() <= 1 / 255 + 1e-6
    once.save_npz(tmp_path / "b.npz", uint8=True)
    assert torch.equal(load_npz(tmp_path / "b.npz").images, once.images)


def test_npz_of_no_images(tmp_path):
    some_images()[:0].save_npz(tmp_path / "a.npz")
    assert len(load_npz(tmp_path / "a.npz")) == 0


def test_npz_uint8_in_both_layouts(tmp_path):
    nchw = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    nchw[0, 0, 0, :2] = 0, 255
    np.savez(tmp_path / "nchw.npz", images=nchw, labels=[0, 7], num_classes=8)
    np.savez(tmp_path / "nhwc.npz", images=nchw.transpose(0, 2, 3, 1), labels=[0, 7], num_classes=8)
    first, last = load_npz(tmp_path / "nchw.npz"), load_npz(tmp_path / "nhwc.npz")
    assert torch.equal(first.images, last.images) and first.images.shape == (2, 3, 4, 5)
    assert first.images[0, 0, 0, :2].tolist() == [-1, 1]
    assert first.num_classes == 8
    assert load_npz(tmp_path / "nchw.npz", num_classes=10).num_classes == 10


def test_a_range_of_tiny_numbers_is_read_like_any_other(tmp_path):
    path, images = tmp_path / "tiny.npz", np.linspace(0, 1, 16).reshape(1, 1, 4, 4)
    np.savez(path, images=images * 1e-310, range=np.array([0, 1e-310]), labels=[0])
    assert torch.allclose(load_npz(path).images, torch.from_numpy(images * 2 - 1).float(), atol=1e-6)


GOOD = {"images": np.full((2, 1, 4, 4), -0.5), "labels": np.array([0, 1])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no array images; it has ['labels']"),
        ({"labels": None}, "no array labels; it has ['images']"),
        ({"images": np.zeros((2, 4, 4))}, "not [2, 4, 4]"),
        ({"images": np.zeros((2, 4, 4, 4))}, "[n, H, W, C] with C in (1, 3), not [2, 4, 4, 4]"),
        ({"images": np.zeros((2, 1, 4, 4), dtype=np.int32)}, "uint8 or floats, not int32"),
        ({"images": np.full((2, 1, 4, 4), np.nan)}, "finite; 32 of 32 values do not: nan"),
        (
            {"images": np.full((2, 1, 4, 4), 255.0)},
            "must lie in [-1, 1], not from 255 to 255; or say what black and white",
        ),
        ({"range": np.array([0, 1])}, "must lie in range, [0, 1]; 32 of 32 values do not: -0.5"),
        (
            {"images": np.full((2, 1, 4, 4), np.nan), "range": np.array([0, 1])},
            "range, [0, 1]; 32 of 32 values do not: nan",
        ),
        ({"range": np.array([1, 0])}, "the number of black, then the larger one of white, not [1, 0]"),
        ({"range": np.array([0, np.inf])}, "the number of black, then the larger one of white, not [0, inf]"),
        ({"range": np.array(1)}, "range must be two numbers"),
        ({"range": np.array(["a", "b"])}, "range must be two numbers"),
        ({"labels": np.array([0, 1, 2])}, "labels must be of shape [2], one an image, not [3]"),
        ({"labels": np.array([[0], [1]])}, "labels must be one integer an image, not an array of shape [2, 1]"),
        ({"labels": np.array([0.0, 1.0])}, "labels must be integers, not float64"),
        ({"labels": np.array(1)}, "labels must be one integer an image, not an array of shape []"),
        ({"labels": np.array(["cat", "dog"])}, "labels must be integers, not <U3: number the classes from 0"),
        ({"labels": np.array([0, -1])}, "labels must count from 0, and the least of them is -1"),
        ({"labels": np.array([0, -1]), "num_classes": 3}, "lie in 0 .. 2; 1 of 2 values do not: -1"),
        ({"images": np.zeros((2, 1, 0, 4), np.uint8)}, "images must have pixels, not the shape [2, 1, 0, 4]"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint16)}, "not uint16: give other integers as floats, with their range"),
        ({"range": np.array([-1.5e308, 1.5e308])}, "the number of black, then the larger one of white"),
        ({"labels": np.array([0, 7]), "num_classes": 3}, "lie in 0 .. 2; 1 of 2 values do not: 7"),
        *(
            ({"num_classes": np.array(bad)}, "num_classes must be an integer, not array(")
            for bad in ([2, 2], 2.5, np.inf, np.nan, "2", 2j)
        ),
        ({"labels": np.array([0, "x"], dtype=object)}, "pickled objects are refused"),
    ],
)
def test_bad_npz_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in {**GOOD, **change}.items() if array is not None})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_npz(path)
    assert str(caught.value).startswith(f"{path}: ")


# --- npz files that fit the format but may not mean what it means


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def drawn_floats(seed, least, most):
    """Draw floats [3, 1, 4, 4] whose smallest and largest numbers are `least` and `most`."""
    images = np.random.default_rng(seed).uniform(least, most, (3, 1, 4, 4))
    images[0, 0, 0, :2] = least, most
    return images


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    black=st.sampled_from([0.0, -1.0, -0.5, 0.25]),
    width=st.sampled_from([1.0, 2.0, 255.0, 0.5, 1000.0]),
    dtype=st.sampled_from(["float32", "float64", "float16"]),
)
def test_floats_of_any_range_are_refused_or_read_as_the_file_says(tmp_path_factory, seed, black, width, dtype):
    """Without a negative number, 0 .. 1 can't be told from -1 .. 1; numbers beyond -1 .. 1 are certainly in another range."""
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    images = drawn_floats(seed, black, black + width).astype(dtype)
    labels = [0, 1, 2]
    saved(path, images=images, labels=labels)
    if -1 <= black < 0 and black + width <= 1:
        assert torch.equal(load_npz(path).images, torch.from_numpy(images).float())
    else:
        with pytest.raises(ValueError, match=r"range=\[0, 1\]|range=\[0, 255\]"):
            load_npz(path)
    found = load_npz(saved(path, images=images, labels=labels, range=[black, black + width])).images
    wanted = 2 * (images.astype(np.float64) - black) / width - 1
    torch.testing.assert_close(found, torch.from_numpy(wanted).float(), rtol=0, atol=1e-6)
    assert found.min() == -1 and found.max() == wanted.astype(np.float32).max()  # 1, but float16 has no 1000.25


@pytest.mark.parametrize("white", [1, 2, 15, 127])
@pytest.mark.parametrize("dtype", ["uint8", "bool"])
def test_dark_bytes_are_refused_until_the_file_says_what_white_is(tmp_path, white, dtype):
    images = np.arange(32).reshape(2, 1, 4, 4) % (white + 1)
    images[0, 0, 0, :2] = 0, white
    images = images.astype(dtype)
    white = int(images.max())
    path = saved(tmp_path / "a.npz", images=images, labels=[0, 1])
    with pytest.raises(ValueError, match=rf"a\.npz: images are bytes of at most {white}, .* range=\[0, {white}\]"):
        load_npz(path)
    found = load_npz(saved(path, images=images, labels=[0, 1], range=[0, white])).images
    assert found.min() == -1 and found.max() == 1
    dark = load_npz(saved(path, images=images, labels=[0, 1], range=[0, 255])).images
    assert torch.equal(dark, torch.from_numpy(images.astype(np.float32)) / 127.5 - 1)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("uint8", [True, False])
def test_what_was_saved_here_comes_back_however_bright_it_is(tmp_path, value, uint8):
    data = LabelledImages(torch.full((2, 1, 2, 2), value), torch.tensor([0, 0]), 3)
    data.save_npz(tmp_path / "a.npz", uint8=uint8)
    back = load_npz(tmp_path / "a.npz")
    torch.testing.assert_close(back.images, data.images, rtol=0, atol=1 / 254 if uint8 else 0)
    assert back.num_classes == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, 3, 4], "labels are 1 .. 4, but no image has label 0: subtract 1, so that they count from 0, or say"),
        ([0, 2, 2, 3], "labels are 0 .. 3, but no image has label 1: say how many classes there are by num_classes=4"),
        ([5, 5, 5, 5], "labels are 5 .. 5, but no image has label 0: subtract 5"),
        ([0, 1, 2, 10**15], "no image has label 3: say how many"),
    ],
)
def test_classes_that_no_image_has_are_refused_unless_the_file_counts_them(tmp_path, labels, message):
    images = np.full((4, 1, 2, 2), -1.0)
    path = saved(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_npz(path)
    if max(labels) < MOST_CLASSES:
        assert load_npz(path, num_classes=MOST_CLASSES).num_classes == MOST_CLASSES
        path = saved(path, images=images, labels=labels, num_classes=max(labels) + 1)
        assert load_npz(path).labels.tolist() == labels
    with pytest.raises(ValueError, match="num_classes must be 1 to 100,000, not 10000000000000000"):
        load_npz(path, num_classes=10**16)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        load_npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("images")
    np.save(tmp_path / "one.npy", GOOD["images"])
    for name in ("text.npz", "one.npy"):
        with pytest.raises(ValueError, match=f"{name}: not an npz"):
            load_npz(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("images", "no array"), archive.writestr("labels", "no array")
    with pytest.raises(ValueError, match=r"zip\.npz: images must be uint8 or floats"):
        load_npz(tmp_path / "zip.npz")


PLACE_AND_BYTE = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))


@settings(deadline=None)
@given(damage=st.lists(PLACE_AND_BYTE, min_size=1, max_size=8))
def test_a_damaged_npz_loads_or_is_refused_but_never_fails_otherwise(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    some_images().save_npz(path)
    content = bytearray(path.read_bytes())
    for place, byte in damage:
        content[int(place * len(content))] = byte
    path.write_bytes(content)
    try:
        load_npz(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    some_images(3).save_npz(path)

    def half(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="disk full"):
        some_images(4).save_npz(path)
    assert os.listdir(tmp_path) == ["data.npz"]
    assert len(load_npz(path)) == 3


# --- the private digits


def test_digits_split_is_fixed_and_complete():
    private, test = digits_split()
    assert private.images.shape == (1437, 1, 8, 8) and test.images.shape == (360, 1, 8, 8)
    assert private.images.min() == -1 and private.images.max() == 1
    counts = (torch.cat([private.images, test.images]) + 1) * 8
    assert torch.equal(counts, counts.round())

    # Every image occurs once: the two parts together are the data set, so that none is in both and none is lost.
    def rows(images, labels):
        return sorted(map(tuple, np.column_stack([images.reshape(len(images), -1), labels]).tolist()))

    whole = load_digits()
    labels = torch.cat([private.labels, test.labels])
    assert rows(counts.numpy(), labels.numpy()) == rows(whole.images, whole.target)

    share = test.labels.bincount() / labels.bincount()
    assert (share - 0.2).abs().max() < 0.01  # stratified

    content = ((test.images + 1) * 8).to(torch.uint8).numpy().tobytes() + bytes(test.labels.tolist())
    assert hashlib.sha256(content).hexdigest()[:16] == "33668cfbe0367fca"


# --- the public digits


def test_font_digits_are_determined_by_the_seed(fonts):
    torch.manual_seed(77)
    again = font_digits(1003, seed=5)
    assert torch.equal(again.images, fonts.images) and torch.equal(again.labels, fonts.labels)
    assert not torch.equal(font_digits(1003, seed=6).images, fonts.images)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    font_digits(3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_font_digits_are_balanced_shuffled_and_varied(fonts):
    counts = fonts.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(fonts.labels, torch.arange(1003) % 10)
    assert len(fonts.images.unique(dim=0)) > 990


@pytest.mark.parametrize("size", [8, 32, 5])
def test_font_digits_count_on_pixels_and_fill_the_box(size):
    data = font_digits(200, seed=1, size=size)
    assert data.images.shape == (200, 1, size, size) and data.num_classes == 10
    counts = (data.images + 1) * 8
    assert torch.equal(counts, counts.round())
    ink = data.images[:, 0] > -1
    heights = ink.any(dim=2).sum(dim=1)
    assert (heights >= 0.65 * size).all() and (heights > 0.85 * size).float().mean() > 0.85  # a bend may shorten some
    covered = (data.images + 1).mean(dim=(1, 2, 3)) / 2
    assert covered.min() > 0.08 and covered.max() < 0.6  # neither blank nor a blot


def test_strokes_neither_break_nor_run_together():
    data = font_digits(2000, seed=2, size=32)
    bits = np.pad(data.images[:, 0].numpy() > 0, [(0, 0), (1, 1), (1, 1)])
    pieces = np.array([label(ink, structure=np.ones((3, 3)))[1] for ink in bits])
    assert (pieces == 1).mean() > 0.96
    holes = np.array([label(~ink)[1] - 1 for ink in bits])
    for digit, count in {0: 1, 1: 0, 5: 0, 6: 1, 7: 0, 8: 2, 9: 1}.items():
        assert (holes[data.labels == digit] == count).mean() > 0.85, digit  # a thick pen or a bend may close some


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_written_digit_fills_the_box_and_stays_in_it(seed):
    generator = torch.Generator().manual_seed(seed)
    writing = torch.eye(2) + 0.4 * (torch.rand(20, 2, 2, generator=generator) - 0.5)
    hull = torch.randn(20, 7, 2, generator=generator)
    pen = torch.rand(20, generator=generator)
    unit = torch.rand(20, 3, generator=generator)
    fill, shift = 0.9 + 0.1 * unit[:, 0], 0.3 * unit[:, 1:] - 0.15
    place = torch.cat([fill[:, None], shift], dim=1)
    to_glyph = _box_to_glyph(writing, hull, pen, place)

    # The direct way: place a round pen at every point of the hull, and map each point of its edge to the box.
    turns = torch.linspace(0, 2 * torch.pi, 721)
    edge = hull[:, :, None] + pen[:, None, None, None] * torch.stack([turns.cos(), turns.sin()], dim=1)
    inverse = torch.linalg.inv(to_glyph[:, :, :2])
    box = (edge.flatten(1, 2) - to_glyph[:, None, :, 2]) @ inverse.mT
    low, high = box.amin(dim=1), box.amax(dim=1)
    assert torch.maximum(-low, high).max() < 1.0001
    torch.testing.assert_close((high - low).amax(dim=1) / 2, fill, rtol=1e-4, atol=1e-4)
    room = 1 - (high - low) / 2
    torch.testing.assert_close((low + high) / 2, shift.clamp(-room, room), rtol=1e-4, atol=1e-4)


def test_a_bigger_size_is_the_same_digit():
    small, large = font_digits(50, seed=3, size=8), font_digits(50, seed=3, size=32)
    shrunk = torch.nn.functional.avg_pool2d(large.images, 4)
    assert torch.equal(small.labels, large.labels)
    assert (shrunk - small.images).abs().mean() < 0.05


@pytest.mark.parametrize(("count", "size"), [(0, 8), (5, 0), (-1, 8)])
def test_font_digits_refuse_nothing_to_draw(count, size):
    with pytest.raises(ValueError, match=f"not {count} and {size}"):
        font_digits(count, seed=0, size=size)


def names_of_digits(font: Path) -> list[str]:
    cmap = TTFont(font).getBestCmap()
    return [cmap.get(ord(digit), "") for digit in DIGITS]


def test_the_fonts_are_those_whose_digits_are_digits():
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    named = {
        font.stem
        for font in folder.glob("*.ttf")
        if all(name.startswith(word) for name, word in zip(names_of_digits(font), WORDS, strict=True))
    }
    assert {font for font in named if not font.startswith("DejaVuSansMono")} == set(PRINTED)


def test_no_glyph_is_blank_and_no_two_fonts_are_one():
    shapes = glyphs(PRINTED)
    ink = shapes.field > 0
    assert len(ink) == len(PRINTED) * len(DIGITS)
    assert (ink.any(dim=3).sum(dim=(1, 2)) >= 63).all()  # every digit has its full height, except for a faint edge
    assert len(ink.unique(dim=0)) == len(ink)
    half_stroke = shapes.stroke / 2  # in units of a glyph's height
    assert half_stroke.min() > 0.03
    assert half_stroke.max() < 0.12


def test_the_signed_distance_counts_from_the_edge():
    field = glyphs(PRINTED).field * 32  # pixels; a glyph is 64 pixels or 2 units high
    assert field.abs().min() == 0.5
    for axis in (2, 3):
        assert 0.99 < field.diff(dim=axis).abs().max() < 1.01  # each step is one pixel, over the edge too


@pytest.mark.parametrize(
    ("table", "names", "synonyms"),
    [
        ([], (), {}),
        (["cat", "dog"], ("cat", "dog"), {}),
        (["tench, Tinca tinca", "dog"], ("tench", "dog"), {"tench, Tinca tinca": "tench", "Tinca tinca": "tench"}),
        (["crane", "crane"], ("crane (0)", "crane (1)"), {}),
        (["maillot", "maillot, tank suit"], ("maillot (0)", "maillot, tank suit"), {"tank suit": "maillot, tank suit"}),
        (["a, b", "b"], ("a", "b (1)"), {"a, b": "a"}),
    ],
)
def test_a_table_of_classes_with_several_names_gives_each_one(table, names, synonyms):
    assert named_classes(table) == (names, synonyms)
    assert len(set(names)) == len(table) and set(synonyms.values()) <= set(names)


def test_handwritten_digits_are_whole():
    fonts = handwritten()
    assert len(set(fonts)) == len(fonts) > 100 and not set(fonts) & set(PRINTED)
    ink = glyphs(fonts).field[:, 0] > 0
    assert (ink.any(2).sum(1) >= GLYPH - 3).all()  # each has its full height, except for faint edges
    assert not ink[:, :, [0, -1]].any()  # and lies within its strip
    assert max(label(drawing)[1] for drawing in ink.numpy()) <= 2
    middle = slice(CANVAS // 2 - 4, CANVAS // 2 + 4)
    assert not ink[:: len(DIGITS), middle, middle].any()  # no stroke crosses a zero
    assert len(ink.unique(dim=0)) == len(ink)


def test_a_font_digit_has_one_of_the_fonts_asked_for():
    printed, written = font_digits(200, 3, 28), font_digits(200, 3, 28, fonts=handwritten())
    assert torch.equal(printed.labels, written.labels) and not torch.equal(printed.images, written.images)
    assert torch.equal(printed.images, font_digits(200, 3, 28, fonts=PRINTED).images)
    styles = font_styles(200, 3, 28, fonts=(*PRINTED, *handwritten()))
    assert styles.num_classes == 200
    assert {name.split()[1] for name in styles.class_names} == {*FAMILIES, "handwriting"}
    share = sum("handwriting" in styles.class_names[label] for label in styles.labels.tolist()) / 200
    assert 0.7 < share < 0.95  # 109 of 127 fonts
