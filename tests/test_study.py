"""The study file: every setting typed and in range, every mistake named with table, key and mend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cmrhpc import planning
from cmrhpc.errors import BadInput
from cmrhpc.study import GENERATORS, STUDIES, Study, arm_parts, cell_of, parse_study
from tests.whole.conftest import cmrhpc


def test_resolved_study_survives_json(study_text: str) -> None:
    study = parse_study(study_text)
    assert Study.from_json(study.to_json()) == study


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("image_size = 16", "image_sise = 16", ["image_sise", "[data]", 'did you mean "image_size"']),
        ("image_size = 16", 'image_size = "16"', ["data.image_size", "a whole number"]),
        ("image_size = 16", "image_size = true", ["data.image_size", "a whole number"]),
        ("spacing_mm = 5.0", "spacing_mm = nan", ["data.spacing_mm", "finite"]),
        ("image_size = 16", "image_size = 77", ["77 does not fit", "72, 80"]),
        ("k = 2", "k = 1", ["folds.k", "2 to 100"]),
        ("[folds]", "[flods]", ["flods", 'did you mean "folds"']),
        ('name = "affine"', 'name = "afine"', ["afine", '[[arms]] number 2 "afine"']),
        ("ratios = [1, 2]", "ratios = [1, 9]", ["ratio 9", "max_ratio", '[[arms]] number 3 "dae-gan"']),
        ("ratios = [1, 2]", 'ratios = [1, "2"]', ["a number", '[[arms]] number 3 "dae-gan" ratios number 2']),
        ("ratios = [1, 2]", "ratio = [1, 2]", ["unknown key", '[[arms]] number 3 "dae-gan"', 'did you mean "ratios"']),
        ('name = "affine"', "name = 2", ["a text in quotes", "[[arms]] number 2 name"]),
        ('name = "affine"', "", ['"name" is missing', "[[arms]] number 2"]),
        ("ratios = [1, 2]", "ratios = [1, 1]", ["different ratios"]),
        ("ratios = [1, 2]", "ratios = [1, 2, 1.0000001]", ['two ratios of "dae-gan" are 1 to six digits']),
        (
            "ratios = [1, 2]",
            'ratios = [1, 2]\n[[arms]]\nname = "dae-gan"\nratios = [1.9999999]',
            ["are 2 to six digits"],
        ),
        ('classes = ["0", "1"]', 'classes = ["0", "0"]', ["different classes"]),
        ("\nratio = 2\n", "\nratio = 3\n", ["primary", "not an arm of the study"]),
        ("[generators.dae-gan]", "[generators.gaedan]", ["gaedan"]),
        ("components = 2", "mutations = []", ["at least one", "minimax, heuristic, least-squares, each once"]),
        ("[data]", "[data", ["not valid TOML"]),
        ('raw = "raw"', "", ['"raw" is missing', "[data]"]),
        ('raw = "raw"', 'raw = "a\\u0007b"', ["data.raw", "control characters"]),
    ],
)
def test_each_mistake_is_named(study_text: str, old: str, new: str, words: list[str]) -> None:
    assert old in study_text
    with pytest.raises(BadInput) as raised:
        parse_study(study_text.replace(old, new, 1))
    assert raised.value.exit_code == 3
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("primary", "words"),
    [
        (
            'arm = "dae-gan"\nratio = 2\nversus = "repeat-real"',
            ["[primary] versus", '"repeat-real"', 'versus = "none"'],
        ),
        ('arm = "dae-gan"\nratio = 2\nversus = "dae-gan+affine"', ["[primary] versus", '"dae-gan+affine"']),
        ('arm = "none"\nversus = "affine"', ["[primary] arm", 'arm = "affine" and versus = "none"']),
        ('arm = "affine"\nversus = "affine"', ["of an arm with itself"]),
        ('arm = "dae-gan"\nratio = 0', ["of an arm with itself"]),
    ],
)
def test_a_primary_comparison_that_would_be_answered_as_another_is_refused(
    study_text: str, primary: str, words: list[str]
) -> None:
    arms, _ = study_text.split("[primary]")
    text = f'{arms}[[arms]]\nname = "repeat-real"\nratios = [0, 1]\n[primary]\nclassifier = "resnet50"\n{primary}\n'
    with pytest.raises(BadInput) as raised:
        parse_study(text)
    assert all(word in str(raised.value) for word in words)


EXTERNAL = '[generators.stylegan]\nexternal = "made"\n'


def test_an_external_generator_is_an_arm_with_no_setting_of_training(study_text: str) -> None:
    study = parse_study(study_text + EXTERNAL + '[[arms]]\nname = "stylegan+simgan+affine"\nratios = [5]\n')
    assert study.generators["stylegan"].external == "made"
    assert Study.from_json(study.to_json()) == study
    assert Study.from_json(study.to_share()).generators["stylegan"].external == "(not told)"
    made = [task for task in planning.tasks(study, "synthesize") if task.generator == "stylegan"]
    assert [(task.fold, task.label) for task in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert planning.settings(study, made[0]) == {"external": {"max_ratio": 5.0}}
    # The folder's place, and that there are such generators at all, is no setting of those that are trained here.
    own = planning.tasks(study, "synthesize")[0]
    assert "external" not in planning.settings(study, own)["generator"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (EXTERNAL + "generations = 5\n", "is not trained here, so it has no generations"),
        (EXTERNAL.replace("stylegan", "dcgan"), '"dcgan" cannot name an external generator'),
        (EXTERNAL.replace("stylegan", "repeat-real"), "cannot name an external generator"),
        (EXTERNAL.replace("stylegan", "real"), "cannot name an external generator"),
        (EXTERNAL.replace("stylegan", '"a+b"'), "cannot name an external generator"),
        (EXTERNAL.replace("stylegan", '"../a"'), "cannot name an external generator"),
        (EXTERNAL.replace("stylegan", "simgan"), "cannot name an external generator"),
        (EXTERNAL.replace('"made"', '""'), "names no folder"),
        (EXTERNAL.replace('"made"', "3"), "must be a text in quotes"),
        (EXTERNAL + '[[arms]]\nname = "stylegan"\nratios = [6]\n', "above max_ratio 5"),
    ],
)
def test_mistakes_of_an_external_generator_are_named(study_text: str, text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words.replace("+", r"\+")):
        parse_study(study_text + text)


@pytest.mark.parametrize("settings", ["mixup_alpha = 0.2", 'networks = "residual"'])
def test_a_conditional_generator_that_would_not_learn_its_classes_is_refused(study_text: str, settings: str) -> None:
    with pytest.raises(BadInput, match="only dcgan networks without mixup are conditional"):
        parse_study(study_text + f"[generators.acgan]\n{settings}\n")


def test_two_channels_are_refused(study_text: str) -> None:
    with pytest.raises(BadInput, match="channels"):
        parse_study(study_text.replace("image_size = 16", "image_size = 16\nchannels = 2"))


def test_ratio_0_is_the_arm_without_synthetic_images() -> None:
    study = parse_study((STUDIES / "fu2021.toml").read_text().replace("classes = []", 'classes = ["0", "1"]'))
    told = {name: cell_of(name, 0.0, arm_parts(name, study)) for name in ("dae-gan", "dae-gan+affine", "repeat-real")}
    assert told == {"dae-gan": ("none", 0.0), "dae-gan+affine": ("affine", 0.0), "repeat-real": ("none", 0.0)}


def test_shipped_studies_have_the_task_counts_of_a_count_by_hand() -> None:
    def counts(name: str) -> dict[str, int]:
        text = (STUDIES / f"{name}.toml").read_text().replace("classes = []", 'classes = ["0", "1"]')
        study = parse_study(text)
        return {stage: len(planning.tasks(study, stage)) for stage in planning.STAGES}

    # demo: 2 folds x 1 repeat; 2 classes; 4 arms x 2 classifiers.
    assert counts("demo") == {"ingest": 1, "synthesize": 4, "refine": 4, "classify": 16, "aggregate": 1}
    # fu2021: 25 places. Generators: dae-gan, egan, dcgan per class (6) and acgan once. Refiner: dae-gan per class (2).
    # Cells: none, affine, dcgan, acgan, egan (5); dae-gan 1..5 without and with affine (10); dae-gan+simgan and
    # repeat-real 1..5 (10); ratio 0 is none or affine. 25 cells x 2 classifiers.
    expected = {"ingest": 1, "synthesize": 25 * 7, "refine": 25 * 2, "classify": 25 * 50, "aggregate": 1}
    assert counts("fu2021") == expected


def test_the_count_by_hand_in_the_docs_is_what_plan_prints(tmp_path: Path) -> None:
    text = (STUDIES / "fu2021.toml").read_text().replace("classes = []", 'classes = ["0", "1"]')
    (tmp_path / "study.toml").write_text(text.replace('raw = ""', 'raw = "raw"'))
    printed = json.loads(cmrhpc("plan", tmp_path, "--json").stdout)["stages"]
    page = (STUDIES.parents[1] / "docs" / "fu2021.md").read_text()
    by_hand = {name: int(count) for name, count in re.findall(r"^\| (\w+) \| (\d+) \|$", page, re.MULTILINE)}
    assert by_hand == {stage: count["total"] for stage, count in printed.items()}
    assert f"= {sum(by_hand.values())}." in page
    cells = re.findall(r"^\|[^|]+\|[^|]+\| (\d+)", page, re.MULTILINE)
    study = parse_study(text)
    assert sum(map(int, cells)) == len(planning.cells(study)) == 25


def test_fu2021_has_every_arm_of_the_papers_and_no_option_of_ours(tmp_path: Path) -> None:
    study = parse_study((STUDIES / "fu2021.toml").read_text().replace("classes = []", 'classes = ["0", "1"]'))
    sweep = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert {arm.name: arm.ratios for arm in study.arms} == {
        "none": (0.0,),
        "affine": (0.0,),
        **dict.fromkeys(("dcgan", "acgan", "egan"), (3.0,)),
        "repeat-real": sweep[1:],
        "dae-gan": sweep,
        "dae-gan+affine": sweep,
        "dae-gan+simgan": sweep[1:],
    }
    kinds = {
        name: (g.networks, g.mixup_alpha > 0, g.components, len(g.mutations), g.conditional)
        for name, g in study.generators.items()
    }
    assert kinds == {
        "dae-gan": ("residual", True, 10, 3, False),
        "egan": ("dcgan", False, 1, 3, False),
        "dcgan": ("dcgan", False, 1, 1, False),
        "acgan": ("dcgan", False, 1, 1, True),
    }
    assert all(made.expand for made in (*study.generators.values(), *study.refiners.values()))
    assert study.generators["dcgan"].mutations == study.generators["acgan"].mutations == ("heuristic",)
    for generator in study.generators.values():
        assert (generator.diffaugment, generator.spectral_norm, generator.ema, generator.r1) == (False, False, 0.0, 0.0)
    for name in GENERATORS:
        assert not {"diffaugment", "spectral_norm", "ema", "r1"} & set(GENERATORS[name])
