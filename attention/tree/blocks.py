"""Which tokens of a step attend to which keys, as a list of dense blocks instead of a mask.

Queries are laid out depth-first, so that all queries below a node are one contiguous slice. A block is such a slice and
the node whose keys these queries see. A query has one *self* block, or its row's tail if it was generated, and one
*cross* block for each node above it.

Knows integers and tree nodes only: no model, no tensor, no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from segue.attention.tree.node import Node


@dataclass(frozen=True, slots=True)
class SelfBlock:
    """A node computed in this step over its own keys: queries `[start, stop)`."""

    node: Node
    start: int
    stop: int
    is_causal: bool


@dataclass(frozen=True, slots=True)
class CrossBlock:
    """All queries below a node, `[start, stop)`, over all of the node's keys."""

    node: Node
    start: int
    stop: int
    level: int  # depth of the node; blocks of one level have disjoint queries


@dataclass(frozen=True, slots=True)
class StepBlocks:
    """One forward pass over `T` packed tokens."""

    token_ids: tuple[int, ...]  # [T]; a decode query's token is the row's last generated one
    position_ids: tuple[int, ...]  # [T]
    self_blocks: tuple[SelfBlock, ...]
    cross_blocks: tuple[CrossBlock, ...]  # by level
    decode_index: tuple[int, ...]  # packed index of each decode row, in the order given
    long_tokens: tuple[range, ...] = ()  # those of rows below a root of long ones

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class DecodeQuery:
    """One generating row in a step: the token to feed, below the node its prompt ends at."""

    end: Node
    token_id: int
    position: int


def blocks_of(new_nodes: Sequence[Node], decode: Sequence[DecodeQuery]) -> StepBlocks:
    """The blocks of a step that computes `new_nodes` and one token for each decode query.

    Every node above must be computed already or be among `new_nodes`. Raises ValueError otherwise.
    """
    return _Layout(new_nodes, decode).build()


class _Layout:
    """The depth-first walk over just the paths that this step touches."""

    def __init__(self, new_nodes: Sequence[Node], decode: Sequence[DecodeQuery]) -> None:
        self.new_nodes = set(new_nodes)
        self.decode = decode
        self.rows_at: dict[Node, list[int]] = {}
        self.children: dict[Node, list[Node]] = {}
        self.roots: list[Node] = []
        for node in new_nodes:
            self._link(node)
        for index, query in enumerate(decode):
            if query.end in self.new_nodes:
                raise ValueError("a row cannot decode below a node that is computed in the same step")
            self._link(query.end)
            self.rows_at.setdefault(query.end, []).append(index)

    def _link(self, node: Node) -> None:
        """Make the path to `node` part of the walk."""
        path: list[Node] = []
        above: Node | None = node
        while above is not None and above not in self.children:
            path.append(above)
            above = above.parent
        for below in reversed(path):
            self.children[below] = []
            if below.parent is None:
                self.roots.append(below)
            elif below.is_computed or below in self.new_nodes:
                self.children[below.parent].append(below)
            else:
                raise ValueError(
                    f"a node of {len(below)} tokens at position {below.start} is used before it is computed"
                )

    def build(self) -> StepBlocks:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.self_blocks: list[SelfBlock] = []
        self.cross_blocks: list[CrossBlock] = []
        self.decode_index = [0] * len(self.decode)
        long_tokens: list[range] = []
        for root in self.roots:
            start = len(self.tokens)
            self._walk(root)
            if root.is_long:
                long_tokens.append(range(start, len(self.tokens)))
        self.cross_blocks.sort(key=lambda block: block.level)
        return StepBlocks(
            tuple(self.tokens),
            tuple(self.positions),
            tuple(self.self_blocks),
            tuple(self.cross_blocks),
            tuple(self.decode_index),
            tuple(long_tokens),
        )

    def _walk(self, root: Node) -> None:
        """Depth-first without recursion: conversations may be hundreds of nodes deep."""
        stack: list[tuple[Node, int, int]] = [(root, -1, -1)]
        while stack:
            node, level, below = stack.pop()
            if below >= 0:
                self._close(node, level, below)
                continue
            self._emit_own(node)
            stack.append((node, level, len(self.tokens)))
            self._emit_decode(node)
            stack.extend((child, level + 1, -1) for child in reversed(self.children[node]))

    def _emit_own(self, node: Node) -> None:
        if node not in self.new_nodes:
            return
        start = len(self.tokens)
        self.tokens.extend(node.token_ids)
        self.positions.extend(range(node.start, node.stop))
        causal = not node.bidirectional and len(node) > 1
        self.self_blocks.append(SelfBlock(node, start, len(self.tokens), causal))

    def _emit_decode(self, node: Node) -> None:
        for index in self.rows_at.get(node, ()):
            query = self.decode[index]
            self.decode_index[index] = len(self.tokens)
            self.tokens.append(query.token_id)
            self.positions.append(query.position)

    def _close(self, node: Node, level: int, below: int) -> None:
        if len(self.tokens) > below and not node.is_root:
            self.cross_blocks.append(CrossBlock(node, below, len(self.tokens), level))
