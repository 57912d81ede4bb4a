"""SmolLM2's tokenizer, and encoders with it."""

from pathlib import Path
from typing import Any

import pytest
from smollm import SOURCE, encoder_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from segue.workers.models.source import locate, safetensors_directory
from segue.workers.prompts.encoder import PromptEncoder


@pytest.fixture(scope="session")
def directory() -> Path:
    """Converted once a machine: reading the tokenizer out of the GGUF file takes a quarter of a minute."""
    return safetensors_directory(locate(SOURCE))


@pytest.fixture(scope="session")
def smollm(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.fixture(scope="session")
def chat(smollm: Any) -> PromptEncoder:
    return encoder_of(smollm)


@pytest.fixture(scope="session")
def with_bos(smollm: Any, directory: Path) -> Any:
    """The same tokenizer, but it begins plain text with BOS, as Llama's does."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 1
    return tokenizer
