"""Request coalescing: rows that ask exactly the same are computed once, and the answer is given to each of them.

Only rows whose answers are certain to be equal: scored rows, rows that want logits, and greedy rows under equal
parameters. Sampled rows draw for themselves. Knows requests and outputs; no model, no tree.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from segue.workers.rows.request import RequestOutput
from segue.workers.sampling.sample import Request


@dataclass(slots=True)
class _First:
    """The row that is computed, and those that wait for its answer."""

    identity: Hashable
    followers: list[Hashable] = field(default_factory=list)
    is_wanted: bool = True  # False: the row itself was aborted, and is computed for its followers


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

    def forget(self, request_ids: Collection[Hashable]) -> set[Hashable]:
        """These rows want no answer any more. Returns the rows that need not be computed any more.

        A row is computed on for rows that joined it, and a row that was forgotten before goes with the last of them.
        """
        needless = {*request_ids}
        for request_id, first in list(self._firsts.items()):
            first.followers = [follower for follower in first.followers if follower not in request_ids]
            first.is_wanted = first.is_wanted and request_id not in request_ids
            if first.followers:
                needless.discard(request_id)
            elif not first.is_wanted:
                needless.add(request_id)
                self._pop(request_id)
        return needless

    def answers(self, outputs: Iterable[RequestOutput]) -> Iterator[RequestOutput]:
        """Each output, followed by those of the rows that joined it. Their prompts count as cached."""
        for output in outputs:
            first = self._pop(output.request_id)
            if first is None or first.is_wanted:
                yield output
            num_cached = output.num_prompt_tokens if output.error is None else 0
            for request_id in first.followers if first else ():
                yield replace(output, request_id=request_id, num_cached_tokens=num_cached)

    def _pop(self, request_id: Hashable) -> _First | None:
        first = self._firsts.pop(request_id, None)
        if first is not None:
            del self._id_of[first.identity]
        return first


def _identity(request: Request) -> Hashable | None:
    """What decides a row's answer; None if its own draws do."""
    if request.continuation is not None:
        return (request.segments, request.continuation)
    if request.wants_logits:
        return (request.segments, "logits")
    return (request.segments, request.params) if request.params.temperature == 0 else None
