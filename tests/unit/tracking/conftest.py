"""What the tracking tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def clean_wandb(tmp_path: Path) -> Iterator[None]:
    """No W&B account and no W&B settings but the test's own; also none that a test leaves behind."""
    saved = dict(os.environ)
    for key in [key for key in os.environ if key.startswith("WANDB") or key.lower().endswith("_proxy")]:
        del os.environ[key]
    home = tmp_path / "home"
    home.mkdir()
    os.environ["HOME"] = str(home)
    os.environ["WANDB_CONFIG_DIR"] = str(home)
    yield
    os.environ.clear()
    os.environ.update(saved)
