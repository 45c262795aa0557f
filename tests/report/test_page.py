"""The page: whole in one file, harmless whatever the names are, the same every time, and saying what it must."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmrhpc import shards
from cmrhpc.report import figures
from cmrhpc.report.aggregate import aggregate, terminal_table
from cmrhpc.report.collect import collect
from cmrhpc.report.gallery import Gallery
from cmrhpc.report.page import _distance_note
from cmrhpc.report.result import evaluate
from tests.report import made
from tests.report.made import visible_text

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Collects tags and attributes and notes every tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    study = made.study(arms="none affine dae-gan:0,1,3 dae-gan+affine:1,3", classes=("normal", "disease"))
    one = made.cohort(study, patients=(6, 15))
    made.write(root, study, one, made.noisy_scores(one.label, 2, {}), skip=lambda t: (t.arm, t.fold) == ("affine", 2))
    return aggregate(root).folder


def test_page_is_one_sound_file_without_anything_from_outside(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    parser = parsed(page)
    assert (parser.open, parser.wrong) == ([], [])
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "link", "iframe", "object", "form", "base"}
    for _, attributes in parser.seen:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in page
    assert "default-src 'none'" in page
    targets = {a["id"] for _, a in parser.seen if a.get("id")}
    assert {a["href"].removeprefix("#") for _, a in parser.seen if a.get("href")} <= targets


def test_pictures_of_the_page_are_small_pngs_with_their_size_and_a_text(folder: Path) -> None:
    images = [a for tag, a in parsed((folder / "index.html").read_text()).seen if tag == "img"]
    assert len(images) == 5
    for attributes in images:
        data = base64.b64decode((attributes["src"] or "").partition(",")[2])
        picture = Image.open(io.BytesIO(data))
        picture.load()
        assert picture.width / picture.height == pytest.approx(
            int(attributes["width"] or 0) / int(attributes["height"] or 1), rel=0.01
        )
        assert attributes["alt"]
        assert len(data) < 120_000
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert names == {"accuracy.png", "ratio_curve.png", "folds.png", "roc.png", "classifier_training.png"}


def test_page_answers_first_and_states_the_patients_beside_every_figure(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    text = visible_text(page)
    start = text.index(
        "Does dae-gan at ratio 3 change the accuracy of resnet50, compared with training on real images alone"
    )
    answer = re.search(
        r"ratio 3 of dae-gan: [+-]?\d+\.\d points accuracy, 95 % interval -?\d+\.\d to -?\d+\.\d; not distinguishable",
        text,
    )
    assert answer
    assert start < answer.start() < text.index("Results")
    patients = re.search(
        r"On 6 patients of class normal \(\d+ images\), 15 patients of class disease \(\d+ images\)", text
    )
    assert patients
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.S)
    assert len(captions) == 5
    assert all(patients.group() in visible_text(caption) for caption in captions)
    assert "Only 6 patients of class normal: a rate of that class moves by about 17 points" in text
    assert "2 of 36 cells are missing" in text
    assert "No leak found" in text
    for heading in (
        "Accuracy per arm",
        "Accuracy over the ratio",
        "Fold by fold",
        "ROC curves",
        "Confusion counts",
        "Provenance",
        "how far the figure moves with split and seeds",
        "time of the classifier tasks, last run of each",
        "chosen on validation patients",
    ):
        assert heading in text


def test_a_crowded_figure_says_how_many_arms_it_leaves_out(folder: Path, tmp_path: Path) -> None:
    generators = ("dae-gan", "egan", "dcgan", "acgan")
    study = made.study(arms=" ".join(["none", "affine", *(f"{g}:3 {g}+affine:3" for g in generators)]), repeats=1)
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    shown, title = figures.shown_arms(evaluate(collect(tmp_path)), "resnet50")
    assert (len(shown), title) == (9, "resnet50: 9 of 10 arms")
    assert figures.shown_arms(evaluate(collect(folder.parent)), "resnet50")[1] == "resnet50"


def test_names_and_ids_are_never_html(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    study = made.study(arms="none dae-gan:3", classes=(evil, "$\\frac{a}$ & 'b'"), name="</title><script>1</script>")
    one = made.cohort(study)
    one.patient = np.array([f"<b>{p}</b>" for p in one.patient])
    train, _, test = one.split[0, 0]
    train[np.flatnonzero(test)[:1]] = True  # a leak, so that the page prints a patient id
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}), skip=lambda t: t.fold == 2)
    result = aggregate(tmp_path)
    page = (result.folder / "index.html").read_text()
    parser = parsed(page)
    assert (parser.open, parser.wrong) == ([], [])
    assert not {"script", "b1"} & {tag for tag, _ in parser.seen}
    assert not any("onerror" in attributes for _, attributes in parser.seen)
    assert "&lt;b&gt;p0" in page
    assert result.result.collection.leaks
    assert "Leak: test patients" in page
    markdown = (tmp_path / "report" / "table.md").read_text()
    assert "<img" not in markdown
    assert "<script" not in markdown


def test_a_study_split_by_image_is_called_leaking(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:1,3", group_by="image")
    one = made.cohort(study)
    train, _, test = one.split[0, 0]
    near_copy = np.flatnonzero(test)[0]
    one.patient[np.flatnonzero(train)[0]] = one.patient[near_copy]  # one patient on both sides
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    result = aggregate(tmp_path)
    text = visible_text((result.folder / "index.html").read_text())
    assert text.count("Leaking by design") == 2
    assert result.result.collection.leaks == []
    assert "No test image in training" in text
    markdown = (tmp_path / "report" / "table.md").read_text()
    for words in ("Best ratio, chosen on validation images", "ratio chosen on validation images"):
        assert words in text
        assert words in markdown
    assert "validation patients" not in text + markdown
    assert "some of which may be of the same patients" in _distance_note(study, Gallery())
    assert "which belong to other patients" in _distance_note(made.study(), Gallery())


def test_a_split_by_image_of_one_image_per_patient_leaks_nothing(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3", group_by="image")
    one = made.cohort(study, images=1)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    assert "Leaking" not in (aggregate(tmp_path).folder / "index.html").read_text()


def test_the_page_tells_how_images_were_normalised_and_when_that_tells_the_class(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)
    kinds = {"normal": {"window": 0, "percentile": 9}, "disease": {"window": 15, "percentile": 0}}
    windows = {"normal": {"window 0 to 5": 9, "window 0 to 6": 0}, "disease": {"window 0 to 5": 0, "window 0 to 6": 15}}
    cases = {"apart": kinds, "windows apart": windows, "alike": {"normal": kinds["normal"]}}
    for root, classes in ((tmp_path / name, classes) for name, classes in cases.items()):
        content = shards.write_shard(
            root / "cohort.h5",
            {"id": shards.text_array(one.ids.tolist())},
            schema="cohort-1",
            task={"stage": "ingest"},
            settings={},
            inputs={},
            seed=0,
            attributes={
                "normalise": {"images": {"window": 15, "percentile": 9}, "clipped": 0.0123, "classes": classes}
            },
        )
        made.write(root, study, one, made.noisy_scores(one.label, 2, {}), inputs={"cohort.h5": content})
        text = visible_text((aggregate(root).folder / "index.html").read_text())
        assert "images normalised 9 by percentile, 15 by window; 1.23 % of the pixels clipped" in text
        assert ("a classifier can tell the class by it, so every figure" in text) == ("apart" in root.name)


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder.parent / "predictions", tmp_path / "predictions")
    again = aggregate(tmp_path).folder
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_aggregation_needs_neither_torch_nor_the_packages_of_other_stages(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder.parent / "predictions", tmp_path / "predictions")
    program = (
        "import sys; from pathlib import Path; from cmrhpc.report.aggregate import aggregate\n"
        f"aggregate(Path({str(tmp_path)!r}))\n"
        "print(sorted({'torch', 'SimpleITK', 'submitit', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


def test_the_terminal_table_is_aligned_and_ends_with_the_answer(folder: Path) -> None:
    lines = terminal_table(folder.parent).splitlines()
    rows = lines[: lines.index("")]
    assert len(rows) == 1 + 6
    column = rows[0].index("accuracy %") + len("accuracy %")
    assert all(row[column : column + 2].strip() == "" for row in rows)
    assert "ratio 3 of dae-gan" in lines[len(rows) + 2]
    assert max(map(len, rows)) <= 120
