"""What the tests share: a small study, a small cohort on disk, and the real images where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests marked `device` train: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU here")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; skips where it is not at hand."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"the real images are not at hand: no folder {REAL_DATA}")
    return REAL_DATA


@pytest.fixture
def can_chown(tmp_path: Path) -> None:
    """Skips where files cannot be given to another user and group."""
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.chown(probe, 1, 1)
    except OSError as error:
        pytest.skip(f"needs root to give files away: {error.strerror}")
    probe.unlink()


STUDY = """
name = "small"
seed = 7
classes = ["0", "1"]
[data]
raw = "raw"
image_size = 16
spacing_mm = 5.0
[folds]
k = 2
repeats = 1
[affine]
factor = 2
[generators.dae-gan]
base_channels = 4
generations = 4
batch = 4
scoring_batch = 4
latent_dim = 8
components = 2
max_ratio = 2
log_every = 1
[refiners.simgan]
channels = 4
batch = 4
buffer = 8
steps = 4
pretrain_refiner = 2
pretrain_discriminator = 2
[classifiers.resnet50]
steps = 3
batch = 4
validate_every = 1
[compute]
threads = 1
checkpoint_seconds = 600
[[arms]]
name = "none"
[[arms]]
name = "affine"
[[arms]]
name = "dae-gan"
ratios = [1, 2]
[[arms]]
name = "dae-gan+simgan"
ratios = [2]
[primary]
classifier = "resnet50"
arm = "dae-gan"
ratio = 2
"""


@pytest.fixture
def study_text() -> str:
    """A study of all stages that runs in seconds."""
    return STUDY
