"""What is known of a node's keys and values wherever they lie. Imports no torch, since planning does without."""

from typing import Protocol, Self


class NodeMemory(Protocol):
    """Keys and values of a node's consecutive tokens: they can be counted, and cut in two at a token."""

    @property
    def num_bytes(self) -> int: ...

    def split(self, num_tokens: int) -> tuple[Self, Self]: ...
