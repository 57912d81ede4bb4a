"""Log-likelihoods of given tokens. Each node of the tree is scored once, however many rows want its scores.

The probability of a token needs the hidden state before it. Inside a node this is one of the node's own; for its first
token it is the parent's last. The last token of a continuation is scored from its parent and never fed. In a step, a
hidden state goes through the vocabulary once, however many choices follow it, and only a bounded number of positions
have logits at the same time. Knows nodes and the model's head; no rows, no scheduler.

Shapes: `N` positions, `M` tokens scored at them, `T` packed tokens of a step, `E` hidden width, `V` vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segue.attention.tree.blocks import SelfBlock
from segue.attention.tree.node import Node
from segue.workers.sampling.vocabulary import summarise

MAX_LOGITS = 1 << 22  # logits held at once: 16 MiB in fp32, whatever the vocabulary

Head = Callable[[Tensor], Tensor]  # hidden [N, E] -> logits [N, V] of any type
TokenScore = tuple[float, bool]  # log-probability, and whether the token is the most likely one


@dataclass(frozen=True, slots=True)
class NodeScores:
    """Scores of a node's own tokens, and the hidden states that further tokens may need if it is cut."""

    tokens: tuple[TokenScore, ...]  # N of them
    hidden: Tensor  # [N, E]

    def split(self, num_tokens: int) -> tuple["NodeScores", "NodeScores"]:
        """Copies, so that one half does not hold the other's memory."""
        upper, lower = self.hidden[:num_tokens].clone(), self.hidden[num_tokens:].clone()
        return NodeScores(self.tokens[:num_tokens], upper), NodeScores(self.tokens[num_tokens:], lower)

    @property
    def last_hidden(self) -> Tensor:
        return self.hidden[-1]


@dataclass(frozen=True, slots=True)
class StepScores:
    """The scores of a step."""

    of_nodes: list[tuple[Node, NodeScores]]  # newly computed nodes that a row wants scored
    of_ends: list[TokenScore]
    num_states: int  # hidden states that went through the vocabulary


def score_step(
    blocks: Sequence[SelfBlock], ends: Sequence[tuple[Node, int]], hidden: Tensor, head: Head, vocab_size: int
) -> StepScores:
    """Score the newly computed nodes that rows want scored, and `ends`: (node, the token after it).

    hidden `[T, E]` is the step's; the last hidden state of every node is kept already.
    """
    wanted = [block for block in blocks if block.node.num_scoring]
    positions = _Positions()
    for block in wanted:
        positions.add_node(block)
    for node, token in ends:
        positions.add_end(node, token)
    found = positions.score(hidden, head, vocab_size)
    of_nodes = []
    start = 0
    for block in wanted:
        stop = start + len(block.node)
        of_nodes.append((block.node, NodeScores(tuple(found[start:stop]), hidden[block.start : block.stop].clone())))
        start = stop
    return StepScores(of_nodes, found[start:], positions.num_states)


class _Positions:
    """Hidden states, each once, and the tokens to score at them."""

    def __init__(self) -> None:
        self._ends: dict[Node, int] = {}  # nodes whose last hidden state is wanted, numbered
        self._packed: list[int] = []  # positions inside this step's nodes
        self._rows: list[int] = []  # for each token: the number of an end, or ~number of a packed position
        self._tokens: list[int] = []

    @property
    def num_states(self) -> int:
        return len(self._ends) + len(self._packed)

    def add_node(self, block: SelfBlock) -> None:
        """All tokens of a node."""
        parent = block.node.parent
        if parent is None:
            raise ValueError("the root has no tokens to score")
        self.add_end(parent, block.node.token_ids[0])
        for position, token in enumerate(block.node.token_ids[1:], start=block.start):
            self._rows.append(~len(self._packed))
            self._packed.append(position)
            self._tokens.append(token)

    def add_end(self, node: Node, token: int) -> None:
        """The token after a node."""
        self._rows.append(self._ends.setdefault(node, len(self._ends)))
        self._tokens.append(token)

    def score(self, hidden: Tensor, head: Head, vocab_size: int) -> list[TokenScore]:
        """In the order of adding."""
        if not self._tokens:
            return []
        states = [last_hidden(node)[None] for node in self._ends]
        if self._packed:
            states.append(hidden[torch.tensor(self._packed, device=hidden.device)])
        rows = [row if row >= 0 else len(self._ends) + ~row for row in self._rows]
        logprobs, is_greedy = score_tokens(
            torch.cat(states),
            torch.tensor(rows, device=hidden.device),
            torch.tensor(self._tokens, device=hidden.device),
            head,
            vocab_size,
        )
        return list(zip(logprobs.tolist(), is_greedy.tolist(), strict=True))


def score_tokens(hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, vocab_size: int) -> tuple[Tensor, Tensor]:
    """hidden `[N, E]`, rows `[M]` into it, targets `[M]` -> log-probabilities `[M]` fp32, most likely ones `[M]`.

    Of equal logits the first is the most likely, as for argmax.
    """
    logprobs = torch.empty(len(rows), device=hidden.device)
    is_greedy = torch.empty(len(rows), dtype=torch.bool, device=hidden.device)
    order = rows.argsort()
    borders = torch.searchsorted(rows[order], torch.arange(len(hidden) + 1, device=hidden.device)).tolist()
    for chunk in _chunks(len(hidden), max(1, MAX_LOGITS // vocab_size)):
        logits = head(hidden[chunk])
        which = order[borders[chunk.start] : borders[chunk.stop]]
        local = rows[which] - chunk.start
        highest, most_likely, totals = summarise(logits, with_totals=True)
        logprobs[which] = (logits[local, targets[which]].float() - highest[local]) - totals[local]
        is_greedy[which] = most_likely[local] == targets[which]
    return logprobs, is_greedy


def collect(end: Node, num_context_tokens: int) -> TokenScore:
    """Summed log-probability, and greediness, of the tokens between the context and `end`."""
    scores: list[TokenScore] = []
    for node in end.path():
        if node.start < num_context_tokens:
            continue
        if not isinstance(node.scores, NodeScores):
            raise ValueError(f"a node of {len(node)} tokens at position {node.start} was not scored")
        scores += node.scores.tokens
    return math.fsum(logprob for logprob, _ in scores), all(is_greedy for _, is_greedy in scores)


def last_hidden(node: Node) -> Tensor:
    """`[E]`, the final hidden state of the node's last token. Raises ValueError if it is not there."""
    if not isinstance(node.last_hidden, Tensor):
        raise ValueError(f"the token at position {node.stop} has no hidden state before it")
    return node.last_hidden


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
