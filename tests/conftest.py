"""What several test files share: a local Ray, and a tiny model on disk."""

import pytest


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for all tests of a file that run in this process."""
    from pipeline.cluster import ray_session  # most files need neither Ray nor torch

    with ray_session(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> str:
    """A folder with a random Llama of a few thousand weights, whose tokens are bytes."""
    from tiny_models import tiny_model, tiny_tokenizer

    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)
