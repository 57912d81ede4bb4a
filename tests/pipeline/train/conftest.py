"""One finished training for all tests of this folder that run in the same process."""

from pathlib import Path

import pytest
from finetune_jobs import finetune, write

from segue.pipeline.train.finetune import FinetuneSummary


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, model_directory: str) -> tuple[Path, FinetuneSummary]:
    """The folder of a finished training, and its summary."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, finetune(write(folder, model_directory))
