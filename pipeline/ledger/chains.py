"""A prompt's chain of segments as bytes. Sorting the bytes gives the depth-first order of the segment tree.

Rows that share a beginning then stand side by side, a shorter prompt stands before its continuations, and a
bidirectional segment stands beside equal ones only. The bytes hold the whole chain, so the sort moves each prompt once.
Knows token ids; no text, no Ray.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from segue.attention.segments import Segment, canonical_segments
from segue.workers.rows.request import ScoringRequest

# A segment's mark sorts before every token. So a segment that ends, and all that follows it, sorts before a longer one.
_CAUSAL, _BIDIRECTIONAL, _FIRST_TOKEN = 0, 1, 2
WORD = ">u4"  # big-endian, so that bytes compare as numbers do


def encode_chain(segments: Sequence[Segment]) -> bytes:
    """A canonical chain as bytes, 4 for each token. Only a row with an error has an empty chain."""
    words: list[npt.NDArray[np.uint32]] = []
    for segment in segments:
        mark = _BIDIRECTIONAL if segment.bidirectional else _CAUSAL
        words += [np.array([mark], dtype=np.uint32), np.array(segment.token_ids, dtype=np.uint32) + _FIRST_TOKEN]
    return np.concatenate(words).astype(WORD).tobytes() if words else b""


def decode_chain(chain: bytes) -> tuple[Segment, ...]:
    """The inverse of `encode_chain`. No bytes are no segments."""
    words = np.frombuffer(chain, dtype=WORD).astype(np.int64)
    borders = [*np.flatnonzero(words < _FIRST_TOKEN).tolist(), len(words)]
    return tuple(
        Segment(tuple((words[start + 1 : stop] - _FIRST_TOKEN).tolist()), bool(words[start] == _BIDIRECTIONAL))
        for start, stop in pairwise(borders)
    )


def num_chain_tokens(chain: bytes) -> int:
    """The number of tokens of a chain, without decoding it."""
    return int(np.count_nonzero(np.frombuffer(chain, dtype=WORD) >= _FIRST_TOKEN))


def shared_chains(requests: Iterable[ScoringRequest]) -> list[bytes]:
    """The chains that scoring requests feed and that other requests may begin with. The contexts are canonical."""
    return [
        encode_chain(canonical_segments(request.fed_segments, mask="segment"))
        for request in requests
        if request.is_shared
    ]
