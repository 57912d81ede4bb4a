"""A prompt's chain of segments as bytes whose order is the depth-first order of the segment tree.

Sorting rows by these bytes puts everything that shares a beginning side by side, shorter prompts before their
continuations, and a bidirectional segment beside its equals only. The bytes carry the whole chain, so that the sort
moves each prompt once. Knows token ids; no text, no Ray.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attention.segments import Segment

_END, _CAUSAL, _BIDIRECTIONAL, _FIRST_TOKEN = 0, 1, 2, 3  # every mark sorts before every token
WORD = ">u4"  # big-endian, so that bytes compare as numbers do


def encode_chain(segments: Sequence[Segment]) -> bytes:
    """A canonical chain as bytes, 4 a token. No row has an empty chain but one with an error."""
    words: list[npt.NDArray[np.uint32]] = []
    for segment in segments:
        mark = _BIDIRECTIONAL if segment.bidirectional else _CAUSAL
        words.append(np.array([mark], dtype=np.uint32))
        words.append(np.array(segment.token_ids, dtype=np.uint32) + _FIRST_TOKEN)
        if segment.bidirectional:
            words.append(np.array([_END], dtype=np.uint32))
    return np.concatenate(words).astype(WORD).tobytes() if words else b""


def decode_chain(chain: bytes) -> tuple[Segment, ...]:
    """The inverse of `encode_chain`; no segments for no bytes."""
    if not chain:
        return ()
    words = np.frombuffer(chain, dtype=WORD).astype(np.int64)
    starts = np.flatnonzero((words == _CAUSAL) | (words == _BIDIRECTIONAL))
    stops = [*starts[1:].tolist(), len(words)]
    segments = []
    for start, stop in zip(starts.tolist(), stops, strict=True):
        tokens = words[start + 1 : stop]
        tokens = tokens[tokens >= _FIRST_TOKEN] - _FIRST_TOKEN
        segments.append(Segment(tuple(tokens.tolist()), bool(words[start] == _BIDIRECTIONAL)))
    return tuple(segments)
