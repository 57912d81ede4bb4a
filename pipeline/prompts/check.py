"""Whether a model and a job's prompts can be used at all: the functions that run in the checking child process.

They are not in `pipeline/ready/job.py`, which imports Ray: a child that unpickles a function imports its module, and a
run waits for the child before it plans anything.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segue.pipeline.prompts.render import RenderSpec, encoder_of
from segue.workers.models.adapter_record import AdapterRecord
from segue.workers.models.facts import ConfigFacts
from segue.workers.prompts.encoder import PromptEncoder, import_tokenizers
from segue.workers.prompts.reasoning import ReasoningMarkers
from segue.workers.scoring.pairs import PairEncoder


def import_all() -> None:
    """Import the libraries that the functions below need and that take seconds."""
    from segue.workers.models.inspect import import_models

    import_tokenizers()
    import_models()


def checked_encoder(spec: RenderSpec) -> PromptEncoder:
    """The encoder of a job's prompts. Raises ValueError for anything that would fail in every row."""
    encoder = encoder_of(spec)
    if spec.task != "generate":
        _ = PairEncoder(encoder, encoder.tokenizer).prefix_token_id
    return encoder


def config_facts(directory: Path, wanted: dict[str, Any]) -> Iterator[ConfigFacts]:
    """One value: that of `segue.workers.models.inspect.config_facts`. For a stream of a LimitedProcess."""
    from segue.workers.models import inspect

    yield inspect.config_facts(directory, **wanted)


def adapter_record(spec: RenderSpec, base_identity: str) -> Iterator[AdapterRecord]:
    """One value: the record that an adapter trained with these prompts would have. For a stream of a LimitedProcess."""
    yield checked_encoder(spec).record(spec.mask, base_identity=base_identity)


def reasoning_markers(spec: RenderSpec) -> Iterator[ReasoningMarkers | None]:
    """One value: what stands around the reasoning in answers to these prompts. For a stream of a LimitedProcess."""
    yield checked_encoder(spec).reasoning_markers
