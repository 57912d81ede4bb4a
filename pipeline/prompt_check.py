"""Whether a job's prompts can be rendered at all, as it is looked at in a child process.

Apart from `pipeline.job`, which imports Ray and torch: a child that unpickles a function imports its module, and a run
waits for the child before it starts anything.
"""

from collections.abc import Iterator

from pipeline.render import RenderSpec, encoder_of
from workers.adapter_record import AdapterRecord
from workers.pairs import PairEncoder
from workers.prompt_encoder import PromptEncoder


def checked_encoder(spec: RenderSpec) -> PromptEncoder:
    """Raises ValueError for what would fail in every row."""
    encoder = encoder_of(spec)
    if spec.task != "generate":
        _ = PairEncoder(encoder, encoder.tokenizer).prefix_token_id
    return encoder


def adapter_record(spec: RenderSpec, base_identity: str) -> Iterator[AdapterRecord]:
    """What an adapter trained with these prompts would say of them: one value. For a stream of a LimitedProcess."""
    yield checked_encoder(spec).record(spec.mask, base_identity=base_identity)
