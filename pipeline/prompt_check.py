"""Whether a model and a job's prompts can be used at all, as it is looked at in a child process.

Apart from `pipeline.job`, which imports Ray: a child that unpickles a function imports its module, and a run waits for
the child before it plans anything.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.render import RenderSpec, encoder_of
from workers.adapter_record import AdapterRecord
from workers.model_facts import ConfigFacts
from workers.pairs import PairEncoder
from workers.prompt_encoder import PromptEncoder, import_tokenizers


def import_all() -> None:
    """What takes seconds of all that is below."""
    from workers.model_config import import_models

    import_tokenizers()
    import_models()


def checked_encoder(spec: RenderSpec) -> PromptEncoder:
    """Raises ValueError for what would fail in every row."""
    encoder = encoder_of(spec)
    if spec.task != "generate":
        _ = PairEncoder(encoder, encoder.tokenizer).prefix_token_id
    return encoder


def config_facts(directory: Path, wanted: dict[str, Any]) -> Iterator[ConfigFacts]:
    """`workers.model_config.config_facts`, one value. For a stream of a LimitedProcess."""
    from workers import model_config

    yield model_config.config_facts(directory, **wanted)


def adapter_record(spec: RenderSpec, base_identity: str) -> Iterator[AdapterRecord]:
    """What an adapter trained with these prompts would say of them: one value. For a stream of a LimitedProcess."""
    yield checked_encoder(spec).record(spec.mask, base_identity=base_identity)
