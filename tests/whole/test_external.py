"""Images that something else made: the same folds, ratios and checks; nothing is believed that can be looked at."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmrhpc import validity
from cmrhpc.data.export import export
from cmrhpc.data.mha import mha_bytes
from cmrhpc.errors import BadInput
from cmrhpc.planning import STAGES
from cmrhpc.shards import read_shard
from cmrhpc.stages.task import run_task
from cmrhpc.workspace import Workspace
from tests.conftest import STUDY
from tests.whole.conftest import cmrhpc

ASKED = """
[generators.elsewhere]
external = "made"
max_ratio = 2
[[arms]]
name = "elsewhere"
ratios = [1, 2]
"""
PLACE = "fold0_repeat0_class1"
SHARD = f"synthetic/elsewhere/{PLACE}.h5"


def renew(made: Path) -> None:
    """What `sha256sum` writes."""
    files = [path for path in sorted(made.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(made)}\n" for path in files]
    (made / "SHA256SUMS").write_text("".join(lines))


def ask(root: Path, more: str = ASKED) -> Path:
    (root / "study.toml").write_text(STUDY + more)
    return root


@pytest.fixture
def outside(copied: Path) -> Path:
    """A finished workspace and, in `made`, the images of its DAE-GAN as if something else had made them."""
    export(copied, "synthetic/dae-gan", copied / "made", "mha", unit_scale=True)
    return ask(copied)


def make(root: Path, place: str = PLACE) -> None:
    """Run one external task in this process."""
    workspace = Workspace(root)
    names = [task.output for task in workspace.tasks("synthesize")]
    run_task(workspace, "synthesize", names.index(f"synthetic/elsewhere/{place}.h5"))


def refused(root: Path, place: str = PLACE) -> str:
    """The message of an external task, which must be bad input."""
    with pytest.raises(BadInput) as raised:
        make(root, place)
    return str(raised.value)


def missing(root: Path) -> dict[str, str]:
    states = validity.states(Workspace(root))
    return {s.task.output: s.reason for stage in STAGES[:-1] for s in states[stage] if not s.done}


def test_what_export_writes_goes_through_as_the_generator_itself(outside: Path) -> None:
    assert all("elsewhere" in output for output in missing(outside))
    cmrhpc("run", outside)
    for fold in (0, 1):
        for label in (0, 1):
            name = f"fold{fold}_repeat0_class{label}.h5"
            own = read_shard(outside / "synthetic/dae-gan" / name)
            theirs = read_shard(outside / "synthetic/elsewhere" / name)
            assert np.array_equal(own["image"], theirs["image"])
            assert own.strings("train_id") == theirs.strings("train_id")
        for ratio in (1, 2):
            name = f"ratio{ratio}/resnet50/fold{fold}_repeat0.h5"
            own = read_shard(outside / "predictions/dae-gan" / name)
            theirs = read_shard(outside / "predictions/elsewhere" / name)
            assert np.array_equal(own["score"], theirs["score"])
    assert "elsewhere,2" in (outside / "report/table.csv").read_text()
    assert cmrhpc("verify", outside).returncode == 0
    told = json.loads(read_shard(outside / "predictions/elsewhere/ratio1/resnet50/fold0_repeat0.h5").info["study"])
    assert told["generators"]["elsewhere"]["external"] == "(not told)"
    # Elsewhere than here: the folder is gone, what was made from it stays valid.
    shutil.rmtree(outside / "made")
    assert missing(outside) == {}


def test_png_images_are_equal_to_half_a_step_of_eight_bits(copied: Path) -> None:
    cmrhpc("export", copied, "--shard", "synthetic/dae-gan", "--to", copied / "made")
    ask(copied)
    make(copied)
    own, theirs = read_shard(copied / "synthetic/dae-gan" / f"{PLACE}.h5"), read_shard(copied / SHARD)
    assert np.abs(own["image"] - theirs["image"]).max() <= 0.5 / 127.5 + 1e-6


def test_raw_units_come_back_through_their_window(copied: Path) -> None:
    arguments = ["--shard", "synthetic/dae-gan", "--to", copied / "unit", "--format", "mha"]
    cmrhpc("export", copied, *arguments, "--unit-scale")
    assert ',"[-1, 1]",,,' in (copied / "unit" / PLACE / "images.csv").read_text()
    export(copied, "synthetic/dae-gan", copied / "made", "mha")
    assert ",raw,300.0,1800.0," in (copied / "made" / PLACE / "images.csv").read_text()
    ask(copied)
    make(copied)
    own, theirs = read_shard(copied / "synthetic/dae-gan" / f"{PLACE}.h5"), read_shard(copied / SHARD)
    np.testing.assert_allclose(own["image"], theirs["image"], atol=1e-6)


def test_a_changed_image_invalidates_exactly_what_depends_on_it(outside: Path) -> None:
    cmrhpc("run", outside)
    image = outside / "made" / PLACE / "000002_class1.mha"
    image.write_bytes(mha_bytes(np.zeros((16, 16), np.float32), (1.0, 1.0)))
    assert missing(outside) == {}  # planning reads the list alone
    wrong = f"{PLACE}/000002_class1.mha is not the file that SHA256SUMS names"
    assert f"{SHARD}: {wrong}" in cmrhpc("verify", outside, check=False).stdout
    assert missing(outside)[SHARD] == f"the external images of {PLACE} are damaged"  # `verify` told it
    assert wrong in refused(outside)
    renew(outside / "made")
    assert missing(outside) == {
        SHARD: f"the external images of {PLACE} changed",
        **{
            f"predictions/elsewhere/ratio{ratio}/resnet50/fold0_repeat0.h5": (
                f"input {SHARD} is to be made first (the external images of {PLACE} changed)"
            )
            for ratio in (1, 2)
        },
    }
    make(outside)
    assert not read_shard(outside / SHARD)["image"][1].any()


def test_training_images_that_are_not_of_the_fold_are_refused_with_their_ids(outside: Path) -> None:
    folds = read_shard(outside / "folds.h5")
    test, held = folds.strings("repeat0_fold0_test"), folds.strings("repeat0_fold0_validation")
    declaration = outside / "made" / PLACE / "train_ids.csv"
    declaration.write_text(declaration.read_text() + f"{test[0]}\n{held[0]}\n")
    renew(outside / "made")
    words = refused(outside)
    for one in sorted([test[0], held[0]]):
        assert one in words
    assert "2 declared training images are not in the training set of fold 0 repeat 0" in words


def test_images_may_be_declared_as_the_raw_table_names_them(outside: Path) -> None:
    declaration = outside / "made" / PLACE / "train_ids.csv"
    names = [line.split(",")[0] for line in (outside / "raw/cohort.csv").read_text().splitlines()]
    ids = declaration.read_text().split()[1:]
    declaration.write_text("image\n" + "".join(f"{names[int(one[1:])]}\n" for one in ids))
    renew(outside / "made")
    make(outside)
    assert read_shard(outside / SHARD).strings("train_id") == ids
    declaration.write_text("image\nimages/of_somebody_else.mha\n")
    renew(outside / "made")
    assert "rows 1 name no image of the raw table" in refused(outside)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no declaration", "no train_ids.csv: what was the generator trained on?"),
        ("empty declaration", "neither a column id nor a column image"),
        ("unknown id", "1 unknown ids"),
        ("no list", "no SHA256SUMS"),
        ("no line of a list", "SHA256SUMS line 1"),
        ("unlisted file", "more.mha is not in SHA256SUMS"),
        ("missing file", "000001_class1.mha is missing"),
        ("too few", "1 images, but ratio 2 needs"),
        ("no image", "no image"),
        ("no place", f"no folder {PLACE} or class1"),
        ("size", "an image of 8 x 8 pixels, the cohort's have 16 x 16"),
        ("scale", "values from 0 to 255"),
        ("sign", "pixels of type int16 without a scale"),
        ("colour", "a colour image in a grey study"),
        ("broken", "broken file"),
        ("type", "unsupported type"),
    ],
)
def test_what_cannot_be_right_is_refused_in_words(outside: Path, case: str, words: str) -> None:
    made, place = outside / "made", outside / "made" / PLACE
    first, declaration = place / "000001_class1.mha", place / "train_ids.csv"
    if case in ("size", "scale", "sign"):
        side, kind = 8 if case == "size" else 16, np.int16 if case == "sign" else np.float32
        pixels = np.zeros((side, side), kind)
        pixels[0, 0] = 255 * (case != "size")
        first.write_bytes(mha_bytes(pixels, (1.0, 1.0)))
    elif case == "colour":
        Image.fromarray(np.arange(768, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)).save(place / "0.png")
    elif case == "broken":
        first.write_bytes(first.read_bytes()[:-100])
    elif case == "type":
        (place / "0.txt").write_text("no image")
    elif case == "empty declaration":
        declaration.write_text("")
    elif case == "unknown id":
        declaration.write_text("id\nr999999\n")
    elif case == "no declaration":
        declaration.unlink()
    elif case in ("too few", "no image"):
        for path in sorted(place.glob("*.mha"))[case == "too few" :]:
            path.unlink()
    elif case == "no place":
        shutil.rmtree(place)
    renew(made)
    if case == "no list":
        (made / "SHA256SUMS").unlink()
    elif case == "no line of a list":
        (made / "SHA256SUMS").write_text("nonsense\n")
    elif case == "unlisted file":
        shutil.copy(first, place / "more.mha")
    elif case == "missing file":
        first.unlink()
    assert words in refused(outside)


def test_copies_of_real_images_are_found_though_they_went_through_eight_bits(copied: Path) -> None:
    cmrhpc("export", copied, "--shard", "cohort.h5", "--by-fold", "--to", copied / "made")
    ask(copied, ASKED.replace("[1, 2]", "[1]"))
    make(copied)
    done = cmrhpc("verify", copied, check=False)
    assert done.returncode == 5
    count = len(read_shard(copied / SHARD)["image"])
    assert f"{SHARD}: {count} images are copies of real ones, equal to 8 bits" in done.stdout


def test_one_folder_per_class_serves_every_fold_when_no_image_of_the_study_was_seen(outside: Path) -> None:
    made = ask(outside, ASKED.replace("[1, 2]", "[1]")) / "made"
    for label in (0, 1):
        (made / f"fold0_repeat0_class{label}").rename(made / f"class{label}")
        shutil.rmtree(made / f"fold1_repeat0_class{label}")
        ids = (made / f"class{label}/train_ids.csv").read_text()
        (made / f"class{label}/train_ids.csv").write_text("id\n")
    renew(made)
    for fold in (0, 1):
        make(outside, f"fold{fold}_repeat0_class1")
    shards = [read_shard(outside / f"synthetic/elsewhere/fold{fold}_repeat0_class1.h5") for fold in (0, 1)]
    n = min(len(shard["image"]) for shard in shards)
    assert np.array_equal(shards[0]["image"][:n], shards[1]["image"][:n])
    assert [shard.strings("train_id") for shard in shards] == [[], []]
    # With the ids of one fold it serves that fold alone.
    (made / "class1/train_ids.csv").write_text(ids)
    renew(made)
    make(outside)
    assert "not in the training set of fold 1 repeat 0" in refused(outside, "fold1_repeat0_class1")


def test_what_a_desktop_leaves_there_is_no_image(outside: Path) -> None:
    """`find` lists it, and it comes and goes."""
    hidden = outside / "made" / PLACE / ".DS_Store"
    hidden.write_bytes(b"left by a desktop")
    renew(outside / "made")
    make(outside)
    hidden.unlink()
    assert SHARD not in missing(outside)
    assert read_shard(outside / SHARD).info["device"] == "cpu"


def test_a_refiner_may_follow(outside: Path) -> None:
    more = '[[arms]]\nname = "elsewhere+simgan+affine"\nratios = [1]\n'
    ask(outside, ASKED + more)
    cmrhpc("run", outside)
    assert read_shard(outside / "predictions/elsewhere+simgan+affine/ratio1/resnet50/fold0_repeat0.h5")["score"].any()
    assert "refined, elsewhere by simgan, " in (outside / "report/index.html").read_text()


@pytest.mark.timeout(300)
def test_links_and_what_is_no_file_are_refused(outside: Path, tmp_path: Path) -> None:
    place = outside / "made" / PLACE
    image = next(path for path in sorted(place.iterdir()) if path.suffix == ".mha")
    secret = tmp_path / "secret.mha"
    shutil.move(image, secret)
    image.symlink_to(secret)  # the right bytes: the list holds
    assert "is reached through a link, which is not followed" in refused(outside)
    assert not (outside / SHARD).exists()
    image.unlink()
    image.symlink_to("/dev/zero")
    assert "is reached through a link" in refused(outside)
    image.unlink()
    os.mkfifo(image)
    assert "it is not a plain file" in refused(outside)
    image.unlink()
    shutil.copy(secret, image)
    place.rename(tmp_path / "place")
    place.symlink_to(tmp_path / "place")
    assert "is reached through a link" in refused(outside)
    place.unlink()
    (tmp_path / "place").rename(place)
    for name in (f"{PLACE}/train_ids.csv", "SHA256SUMS"):
        path = outside / "made" / name
        path.rename(tmp_path / path.name)
        os.mkfifo(path)
        assert "it is not a plain file" in refused(outside)
        path.unlink()
        path.symlink_to(tmp_path / path.name)
        assert "a link, which is not followed" in refused(outside)
        path.unlink()
        (tmp_path / path.name).rename(path)
    make(outside)
    assert (outside / SHARD).exists()
