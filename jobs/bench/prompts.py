"""Prompts of plain words for the benchmarks: long system prompts that rows share, and words of each row's own."""

import random
from collections.abc import Sequence
from typing import Any

from segue.attention.segments import Segment

COMMON = """
the of and to in is it that for was on are as with his they at be this have from or one had by word but not what all
were we when your can said there use an each which she do how their if will up other about out many then them these so
some her would make like him into time has look two more write go see number no way could people my than first water
been call who oil its now find long down day did get come made may part over new sound take only little work know place
year live me back give most very after thing our just name good sentence man think say great where help through much
before line right too mean old any same tell boy follow came want show also around form three small set put end does
another well large must big even such because turn here why ask went men read need land different home us move try kind
hand picture again change off play spell air away animal house point page letter mother answer found study still learn
"""


def shared_prompts(
    tokenizer: Any,
    num_rows: int,
    *,
    num_systems: int = 1,
    system_words: int = 300,
    own_words: tuple[int, int] = (30, 110),
    seed: int = 0,
) -> list[tuple[Segment, ...]]:
    """For each row a system prompt and its own words. Rows take the system prompts in turn; no words mean no prompt."""
    rng = random.Random(seed)
    systems = [_segment(tokenizer, rng, system_words) for _ in range(num_systems)]
    rows = [_segment(tokenizer, rng, rng.randint(*own_words)) for _ in range(num_rows)]
    if not system_words:
        return [(row,) for row in rows]
    return [(systems[index % num_systems], row) for index, row in enumerate(rows)]


def token_ids(prompt: Sequence[Segment]) -> list[int]:
    """The whole prompt as token ids, for a peer."""
    return [token for segment in prompt for token in segment.token_ids]


def _segment(tokenizer: Any, rng: random.Random, num_words: int) -> Segment:
    words = " ".join(rng.choice(COMMON.split()) for _ in range(num_words))
    return Segment(tuple(tokenizer.encode(f" {words}.", add_special_tokens=False)), True)
