"""Owners of images: every file has one, read in one of three ways, or the folder is refused; and what finetune states."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.synthesis.account import account, read_statement
from fastloda.synthesis.budget import Privacy
from fastloda.synthesis.cli import main
from fastloda.synthesis.data import image_folder, read_owners
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import LayerChoice
from fastloda.synthesis.runs import RunError
from fastloda.synthesis.settings import FineTuning, UNetShape
from fastloda.synthesis.stages import finetune, pretrain

UNET = UNetShape(width=8, norm_groups=4)
QUIET = {"progress": False, "device": "cpu"}
FILES = ("benign/p1_0.png", "benign/p2_0.png", "benign/p2_1.png", "malign/p1_1.png", "malign/p3_0.png")


def write(root: Path, files=FILES) -> Path:
    """Write images of one brightness each, in the order of `files`."""
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 255 - i, np.uint8)).save(root / name)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "images")


def owners_of(root: Path, how: str) -> list[str]:
    return read_owners(root, image_folder(root).files, how)


def write_table(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_files_are_in_the_order_of_the_images(root):
    pixels = image_folder(root).images[:, 0, 0, 0]
    seen = [round((float(value) + 1) * 127.5) for value in pixels]
    assert [FILES[255 - brightness] for brightness in seen] == [
        path.relative_to(root).as_posix() for path in image_folder(root).files
    ]


def test_owners_are_read_from_file_names(root):
    assert owners_of(root, r"(p\d+)_") == ["p1", "p2", "p2", "p1", "p3"]
    assert owners_of(root, r".*_(\d)\.") == ["0", "0", "1", "1", "0"]


def test_owners_are_read_from_subfolders(tmp_path):
    root = write(tmp_path, ("a/Eva/1.png", "a/Kim/x/1.png", "b/Eva/2.png", "b/Kim/y/1.png"))
    assert owners_of(root, "subfolder") == ["Eva", "Kim", "Eva", "Kim"]


def test_owners_are_read_from_a_table(root, tmp_path):
    rows = [f"./{name}, owner {i % 2} ,x" for i, name in enumerate(FILES)]
    table = write_table(tmp_path / "Owners.CSV", "\ufefffile,owner,age\n" + "\n".join([*rows, "other/file.png,,"]))
    assert owners_of(root, table) == ["owner 0", "owner 1", "owner 0", "owner 1", "owner 0"]


REFUSED = {
    "names without the pattern": (
        r"(p[12])_",
        "1 of 5 images have no owner by '(p[12])_': malign/p3_0.png. Owners are read",
    ),
    "a group that takes no part": (r"(x)?p\d", "5 of 5 images have no owner"),
    "an empty group": (r"(x*)p\d", "5 of 5 images have no owner"),
    "a pattern in the middle": (r"(\d)_", "5 of 5 images have no owner"),
    "no subfolders": ("subfolder", "5 of 5 images have no owner by 'subfolder': benign/p1_0.png, benign/p2_0.png"),
    "no group": (r"p\d+", "must have one group, which is the owner, and has 0"),
    "two groups": (r"(p)(\d)", "must have one group, which is the owner, and has 2"),
    "no regular expression": (r"(p", "is no regular expression"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_images_without_an_owner_are_named(root, kind):
    how, said = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(said)):
        owners_of(root, how)


def test_of_many_images_without_an_owner_some_are_named(tmp_path):
    root = write(tmp_path, [f"a/{i}.png" for i in range(8)] + ["a/p1.png"])
    with pytest.raises(ValueError, match=r"8 of 9 images .* a/0.png, a/1.png, a/2.png, a/3.png, a/4.png, \.\.\."):
        owners_of(root, r"(p\d)")


TABLES = {
    "a file left out": ("file,owner\n" + "".join(f"{name},x\n" for name in FILES[1:]), "1 of 5 images have no owner"),
    "no name": ("file,owner\n" + "".join(f"{name},\n" for name in FILES), "5 of 5 images have no owner"),
    "two owners": (f"file,owner\n{FILES[0]},x\n{FILES[0]},y\n", "names two owners of benign/p1_0.png: 'x' and 'y'"),
    "other columns": ("image,patient\n", "must have the columns file and owner, got ['image', 'patient']"),
    "nothing": ("", "must have the columns file and owner, got None"),
    "two spellings": (
        "file,owner\n" + "".join(f"{name},{'xX'[i % 2]}\n" for i, name in enumerate(FILES)),
        "'x' and 'X' differ in case",
    ),
}


@pytest.mark.parametrize(
    "other", ["jose\N{COMBINING ACUTE ACCENT} diaz", "José  Diaz", "JOSÉ DIAZ", "José\N{NO-BREAK SPACE}Diaz"]
)
def test_two_spellings_of_one_name_are_no_two_owners(root, tmp_path, other):
    """Two machines may write a name so: as two owners, each would be promised less than an owner is."""
    rows = "".join(f"{name},{('José Diaz', other)[i % 2]}\n" for i, name in enumerate(FILES))
    with pytest.raises(ValueError, match="give one owner one name"):
        owners_of(root, write_table(tmp_path / "owners.csv", "file,owner\n" + rows))


@pytest.mark.parametrize("kind", TABLES)
def test_bad_tables_are_refused(root, tmp_path, kind):
    text, said = TABLES[kind]
    with pytest.raises(ValueError, match=re.escape(said)):
        owners_of(root, write_table(tmp_path / "owners.csv", text))


def test_what_is_no_folder_of_images_and_no_table_is_refused(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such table of owners"):
        owners_of(root, "missing.csv")
    with pytest.raises(ValueError, match="digits is no folder of images: owners can be read for a folder"):
        read_owners("digits", (), "subfolder")


def test_owners_of_one_image_each_get_a_warning(root):
    with pytest.warns(UserWarning, match="every image has an owner of its own"):
        assert len(set(owners_of(root, r"(p\d_\d)"))) == 5


# ---- finetune


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "public"
    pretrain(
        folder,
        data="font-digits",
        count=64,
        unet=UNET,
        training=PublicTraining(steps=3, batch_size=8, warmup=1, seed=0),
        **QUIET,
    )
    return folder / "public"


def many(root: Path) -> Path:
    """Write 43 images of 12 people, who have one to seven each, of both classes."""
    owners = [owner for owner in range(12) for _ in range(1 + owner % 7)][:48]
    return write(root, [f"{i % 2}/p{owner:02d}_{i:02d}.png" for i, owner in enumerate(owners)])


def test_finetune_by_owner_states_the_unit_and_counts_owners(public, tmp_path):
    data = many(tmp_path / "images")
    owners = Counter(owners_of(data, r"(p\d+)_"))
    privacy = Privacy(target_epsilon=8.0, delta=1e-5, epochs=1, batch_size=4, max_grad_norm=1.0)
    options = {"data": str(data), "owner": r"(p\d+)_", "model": public, "training": FineTuning(seed=1), **QUIET}
    statement = finetune(tmp_path / "run", privacy, per_owner=3, **options)
    assert len(owners) == statement["owners"] == 12 and "records" not in statement
    assert statement["unit"] == "one owner of images, at most 3 of which are used in a step"
    assert statement["adjacency"] == "add/remove one owner with all records"
    assert "per-owner gradients" in statement["mechanism"]
    assert (statement["sample_rate"], statement["steps"]) == (4 / 12, 3)
    accountant = PrivacyAccountant(4 / 12, statement["noise_multiplier"])
    assert statement["epsilon"] == accountant.epsilon(1e-5, 3) <= 8
    assert finetune(tmp_path / "run", privacy, per_owner=3, **options) == statement
    with pytest.raises(RunError, match="per_owner"):
        finetune(tmp_path / "run", privacy, per_owner=2, **options)

    by_image = finetune(tmp_path / "by-image", privacy, **options | {"owner": None})
    assert by_image["unit"] == "one image" and by_image["records"] == sum(owners.values())
    with pytest.raises(ValueError, match="other units of privacy"):
        account(composition=[tmp_path / "run", tmp_path / "by-image"], delta=1e-5)
    finetune(tmp_path / "again", privacy, **options | {"training": FineTuning(seed=2)})
    both = account(composition=[tmp_path / "run", tmp_path / "again"], delta=1e-5)
    assert both["epsilon"] > statement["epsilon"]


def test_what_choose_released_by_image_is_not_counted_as_by_owner(public, tmp_path):
    run, data = tmp_path / "run", many(tmp_path / "images")
    (run / "chosen").mkdir(parents=True)
    (run / "chosen" / "sums.safetensors").touch()
    statement = {"adjacency": "add/remove one record", "sampler": "Poisson"}
    (run / "chosen" / "privacy.json").write_text(json.dumps(statement))
    assert read_statement(run / "chosen") == statement
    privacy = Privacy(target_epsilon=8.0, delta=1e-5, epochs=1, batch_size=4)
    with pytest.raises(ValueError, match="in which each image counts by itself"):
        finetune(run, privacy, data=str(data), owner=r"(p\d+)_", model=public, **QUIET)
    assert not (run / "private").exists()


def test_layers_are_chosen_by_owner_and_the_release_counts_owners(public, tmp_path):
    run, data = tmp_path / "run", many(tmp_path / "images")
    privacy = Privacy(target_epsilon=8.0, delta=1e-5, epochs=1, batch_size=4)
    options = {"data": str(data), "model": public, "layers": LayerChoice(0.5, 20.0)} | QUIET
    statement = finetune(run, privacy, owner=r"(p\d+)_", per_owner=2, **options)
    own = read_statement(run / "layers")
    assert own["adjacency"] == statement["adjacency"] == "add/remove one owner with all records"
    assert own["owners"] == statement["owners"] and statement["earlier"] == [[1.0, 20.0, 1]]
    shutil.rmtree(run / "private")
    with pytest.raises(ValueError, match="in which each owner counts by itself"):
        finetune(run, privacy, **options)


def test_the_command_takes_owners_and_refuses_a_number_without_them(public, tmp_path, capsys):
    data = many(tmp_path / "images")
    command = [
        "finetune",
        "--run",
        str(tmp_path / "run"),
        "--data",
        str(data),
        "--model",
        str(public),
        "--device",
        "cpu",
    ]
    command += ["--privacy.target_epsilon", "8", "--privacy.delta", "1e-5", "--privacy.batch_size", "4"]
    command += ["--privacy.epochs", "0.4", "--progress", "false", "--per_owner", "2"]
    assert main(command) != 0
    assert "--per_owner 2 is for images of owners" in capsys.readouterr().err
    assert main([*command, "--owner", r"(p\d+)_"]) == 0
    assert json.loads((tmp_path / "run" / "private" / "privacy.json").read_text())["owners"] == 12


def test_owners_are_those_of_the_images_that_could_be_read(public, tmp_path):
    """A file that is left out does not shift the others' owners."""
    data = many(tmp_path / "images")
    first, second, *_ = sorted((data / "0").iterdir())
    first.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="left out 1 of 43"):
        images = image_folder(data, skip_unreadable=True)
    owners = read_owners(data, images.files, r"(p\d+)_")
    assert len(owners) == len(images) == 42 and owners[0] == second.name[:3]
    privacy = Privacy(target_epsilon=8.0, delta=1e-5, epochs=0.4, batch_size=4)
    options = {"owner": r"(p\d+)_", "model": public, "skip_unreadable": True}
    with pytest.warns(UserWarning, match="left out 1 of 43"):
        statement = finetune(tmp_path / "run", privacy, data=str(data), **options, **QUIET)
    assert statement["owners"] == len(set(owners)) == 11
    assert "(p" not in (tmp_path / "run" / "private" / "config.yaml").read_text()  # nor would a table's path be there
