"""Log-likelihood of given tokens: each node of the tree is scored once, whoever asks.

The probability of a token needs the hidden state before it: inside a node that is the node's own, for its first token
it is the parent's last. The last token of a continuation is scored from its parent and never fed. Logits exist for a
bounded number of positions at a time. Knows nodes and the model's head; no rows, no scheduler.

Shapes: `N` positions, `E` hidden width, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.blocks import SelfBlock
from attention.tree import Node

MAX_LOGITS = 1 << 24  # numbers of fp32 logits held at once: 64 MiB, whatever the vocabulary

Head = Callable[[Tensor], Tensor]  # hidden [N, E] -> logits [N, V] fp32


@dataclass(frozen=True, slots=True)
class NodeScores:
    """Scores of a node's own tokens, and the hidden states that further tokens may need if it is cut."""

    logprobs: Tensor  # [N] fp32
    is_greedy: Tensor  # [N] bool
    hidden: Tensor  # [N, E]

    def split(self, num_tokens: int) -> tuple["NodeScores", "NodeScores"]:
        """Copies, so that one half does not hold the other's memory."""
        parts = (self.logprobs, self.is_greedy, self.hidden)
        upper, lower = (
            [part[:num_tokens].clone() for part in parts],
            [part[num_tokens:].clone() for part in parts],
        )
        return NodeScores(*upper), NodeScores(*lower)

    @property
    def last_hidden(self) -> Tensor:
        return self.hidden[-1]


def score_blocks(blocks: Sequence[SelfBlock], hidden: Tensor, head: Head, vocab_size: int) -> None:
    """Give every newly computed node that a row wants scored its scores. hidden `[T, E]` is the step's."""
    wanted = [block for block in blocks if block.node.num_scoring]
    if not wanted:
        return
    before = torch.cat([_hidden_before(block, hidden) for block in wanted])
    targets = torch.tensor([token for block in wanted for token in block.node.token_ids], device=hidden.device)
    logprobs, is_greedy = score_tokens(before, targets, head, vocab_size)
    start = 0
    for block in wanted:
        rows = slice(start, start + len(block.node))
        own = hidden[block.start : block.stop].clone()
        block.node.scores = NodeScores(logprobs[rows].clone(), is_greedy[rows].clone(), own)
        start = rows.stop


def score_tokens(hidden: Tensor, targets: Tensor, head: Head, vocab_size: int) -> tuple[Tensor, Tensor]:
    """hidden `[N, E]`, targets `[N]` -> log-probabilities `[N]` fp32, is each the most likely `[N]`."""
    logprobs, is_greedy = [], []
    for rows in _chunks(len(targets), max(1, MAX_LOGITS // vocab_size)):
        logits, wanted = head(hidden[rows]), targets[rows]
        chosen = logits.gather(-1, wanted[:, None])[:, 0]
        logprobs.append(chosen - logits.logsumexp(dim=-1))
        is_greedy.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(logprobs), torch.cat(is_greedy)


def collect(end: Node, num_context_tokens: int) -> tuple[float, bool]:
    """Summed log-probability, and greediness, of the tokens between the context and `end`."""
    logprob, is_greedy = 0.0, True
    for node in end.path():
        if node.start < num_context_tokens:
            continue
        if not isinstance(node.scores, NodeScores):
            raise ValueError(f"a node of {len(node)} tokens at position {node.start} was not scored")
        logprob += float(node.scores.logprobs.double().sum())
        is_greedy = is_greedy and bool(node.scores.is_greedy.all())
    return logprob, is_greedy


def rolling_windows(
    token_ids: Sequence[int], prefix_token_id: int, max_length: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) pairs that predict each token of a text once, each with at least one token of context.

    lm-evaluation-harness' `get_rolling_token_windows` with `context_len=1`, made disjoint: every window but the last is
    full of new tokens, the last one is filled up with context.
    """
    tokens = tuple(token_ids)
    first = min(max_length, len(tokens))
    if first:
        yield (prefix_token_id,), tokens[:first]
    predicted = first
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, max_length)
        stop = predicted + count
        start = max(0, stop - max_length - 1)
        yield tokens[start:predicted], tokens[predicted:stop]
        predicted = stop


def _hidden_before(block: SelfBlock, hidden: Tensor) -> Tensor:
    """The hidden states that predict a node's tokens, `[len(node), E]`."""
    parent = block.node.parent
    if parent is None or not isinstance(parent.last_hidden, Tensor):
        raise ValueError(f"the token at position {block.node.start} has no hidden state before it")
    return torch.cat([parent.last_hidden[None], hidden[block.start : block.stop - 1]])


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
