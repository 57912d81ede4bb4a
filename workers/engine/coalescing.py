"""Request coalescing: rows that ask exactly the same are computed once, and the answer is given to each of them.

Only what is certain to come out equal: scored rows, and greedy ones under equal parameters. Sampled rows draw for
themselves. Knows requests and outputs; no model, no tree.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from segue.workers.rows.request import Request, RequestOutput


@dataclass(slots=True)
class _First:
    """The row that is computed, and those that wait for its answer."""

    identity: Hashable
    followers: list[Hashable] = field(default_factory=list)


class RequestCoalescer:
    """Rows in the engine at the moment, by what they ask."""

    def __init__(self) -> None:
        self._id_of: dict[Hashable, Hashable] = {}  # identity -> request id of the first
        self._firsts: dict[Hashable, _First] = {}  # by request id

    def joins(self, request: Request) -> bool:
        """Whether the same is being computed already: then `request` gets that answer and needs nothing else."""
        identity = _identity(request)
        if identity is None:
            return False
        first = self._id_of.get(identity)
        if first is not None:
            self._firsts[first].followers.append(request.request_id)
            return True
        self._id_of[identity] = request.request_id
        self._firsts[request.request_id] = _First(identity)
        return False

    def answers(self, outputs: Iterable[RequestOutput]) -> Iterator[RequestOutput]:
        """Each output, followed by those of the rows that joined it, whose prompts were wholly there."""
        for output in outputs:
            yield output
            first = self._firsts.pop(output.request_id, None)
            if first is None:
                continue
            del self._id_of[first.identity]
            num_cached = output.num_prompt_tokens if output.error is None else 0
            for request_id in first.followers:
                yield replace(output, request_id=request_id, num_cached_tokens=num_cached)


def _identity(request: Request) -> Hashable | None:
    """What decides a row's answer; None if its own draws do."""
    if request.continuation is not None:
        return (request.segments, request.continuation)
    return (request.segments, request.params) if request.params.temperature == 0 else None
