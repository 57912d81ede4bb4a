"""Whether a model and a job's prompts can be used at all, as it is looked at in a child process.

Apart from `pipeline/ready/job.py`, which imports Ray: a child that unpickles a function imports its module, and a run
waits for the child before it plans anything.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segue.pipeline.prompts.render import RenderSpec, encoder_of
from segue.workers.models.adapter_record import AdapterRecord
from segue.workers.models.facts import ConfigFacts
from segue.workers.prompts.encoder import PromptEncoder, import_tokenizers
from segue.workers.scoring.pairs import PairEncoder


def import_all() -> None:
    """What takes seconds of all that is below."""
    from segue.workers.models.inspect import import_models

    import_tokenizers()
    import_models()


def checked_encoder(spec: RenderSpec) -> PromptEncoder:
    """Raises ValueError for what would fail in every row."""
    encoder = encoder_of(spec)
    if spec.task != "generate":
        _ = PairEncoder(encoder, encoder.tokenizer).prefix_token_id
    return encoder


def config_facts(directory: Path, wanted: dict[str, Any]) -> Iterator[ConfigFacts]:
    """`segue.workers.models.inspect.config_facts`, one value. For a stream of a LimitedProcess."""
    from segue.workers.models import inspect

    yield inspect.config_facts(directory, **wanted)


def adapter_record(spec: RenderSpec, base_identity: str) -> Iterator[AdapterRecord]:
    """What an adapter trained with these prompts would say of them: one value. For a stream of a LimitedProcess."""
    yield checked_encoder(spec).record(spec.mask, base_identity=base_identity)
