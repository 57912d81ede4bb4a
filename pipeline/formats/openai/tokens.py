"""The bytes of a model's tokens, asked of a child process, since a tokenizer may be a stranger's.

Knows processes and models by name; no text and no results.
"""

from collections.abc import Iterable

from segue.pipeline.problems import WorkersFailed
from segue.pipeline.processes.limited import PREPARE_BYTES, ChildDied
from segue.pipeline.ready.child import CHECK_SECONDS, checking_child, found_in_child
from segue.pipeline.storage.models import local_source
from segue.workers.models.token_bytes import model_token_bytes
from segue.workers.prompts.encoder import import_tokenizers


class ModelTokens:
    """The tokens of a job's model. Use it as a context manager: it may have a child process."""

    def __init__(self, source: str, revision: str | None = None) -> None:
        self._source, self._revision = source, revision
        self._bytes: dict[int, bytes] = {}
        self._child = checking_child()

    def __enter__(self) -> "ModelTokens":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()

    def learn(self, token_ids: Iterable[int]) -> None:
        """Ask for tokens that are not known yet. Raises ChildUnready, or WorkersFailed if that ends the process."""
        new = sorted(set(token_ids) - self._bytes.keys())
        if not new:
            return
        self._child.settle(CHECK_SECONDS, PREPARE_BYTES, import_tokenizers)
        try:
            source = local_source(self._source)
            self._bytes |= found_in_child(self._child, model_token_bytes, source, self._revision, new)
        except ChildDied as died:
            raise WorkersFailed(f"the model's tokenizer ended its process ({died.death})") from None

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes[token_id]
