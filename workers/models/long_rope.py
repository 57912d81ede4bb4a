"""Rotary positions of the kind longrope (Phi 3.5, Phi 4 mini), fixed for each row.

Such a model has two sets of frequencies: one for rows up to the length that it was first trained with, one for longer
rows. transformers takes the set of the longest row in a batch, so that a short row changes beside a long one, and a
prompt changes when it is computed in pieces. Here each row has its own set, in whatever step its tokens are. The tree
keeps long rows under a root of their own: keys of one set are of no use to rows of the other.

Shapes: `B` rows of a batch, `T` tokens, `D` numbers of a head that are rotated.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from segue.workers.errors import ModelRefused


class LongRope(nn.Module):
    """Takes the place of a model's rotary module."""

    def __init__(self, own: Any) -> None:
        """`own`: the model's module, of transformers' usual form."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        super().__init__()
        self.most_short = int(own.config.rope_parameters["original_max_position_embeddings"])  # tokens of a short row
        self._scaling = float(own.attention_scaling)
        short = own.original_inv_freq
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](own.config, short.device, seq_len=self.most_short + 1)
        self._frequencies = torch.stack([short, long.to(short.device)]).float()  # [2, D / 2]
        self._is_long: Tensor | None = None  # [T], or [B, 1] for rows of a batch; None: no row is long

    @classmethod
    def install(cls, model: Any) -> Self | None:
        """Replace the model's rotary positions if they are of this kind; None if not.

        Raises ModelRefused if the model computes them in a way of its own.
        """
        decoder = model.get_decoder()
        own = getattr(decoder, "rotary_emb", None)
        if "longrope" not in _kinds(model.config.get_text_config()):
            return None
        if getattr(own, "rope_type", None) == "longrope" and hasattr(own, "original_inv_freq"):
            replaced = cls(own)
            if replaced._agrees(own):
                decoder.rotary_emb = replaced
                return replaced
        raise ModelRefused(
            f"model of type {model.config.model_type!r} is not supported: its rotary positions (longrope) depend on "
            "the longest row of a batch, in a way of its own"
        )

    def _agrees(self, own: Any) -> bool:
        """Whether the model's module gives the same for a short row and for a long one."""
        device = own.original_inv_freq.device
        hidden = torch.empty(1, 1, 1, device=device)
        for position, is_long in ((self.most_short - 1, False), (self.most_short, True)):
            positions = torch.tensor([[position]], device=device)
            with self.rows(torch.tensor([is_long], device=device)):
                pairs = zip(self(hidden, positions), own(hidden, positions), strict=True)
            if not all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in pairs):
                return False
        return True

    @contextmanager
    def rows(self, is_long: Tensor | None) -> Iterator[None]:
        """Which tokens or rows are long, in the block."""
        self._is_long = is_long
        try:
            yield
        finally:
            self._is_long = None

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids `[B, T]` -> cosines and sines, `[B, T, D]` each, in the type of `hidden`."""
        frequencies = self._frequencies.to(hidden.device)
        chosen = frequencies[0] if self._is_long is None else frequencies[self._is_long.long()]
        angles = position_ids[..., None].float() * chosen
        angles = torch.cat([angles, angles], dim=-1)
        return tuple((each * self._scaling).to(hidden.dtype) for each in (angles.cos(), angles.sin()))  # type: ignore[return-value]


def is_long_token(long_tokens: Sequence[range], num_tokens: int, device: torch.device) -> Tensor | None:
    """`[T]` bool; None if no token is of a long row."""
    if not long_tokens:
        return None
    is_long = torch.zeros(num_tokens, dtype=torch.bool)
    for tokens in long_tokens:
        is_long[tokens.start : tokens.stop] = True
    return is_long.to(device)


def _kinds(text: Any) -> set[str]:
    """The kinds of rotary positions that a configuration names, for all layers or for kinds of layers."""
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {str(parameters.get("rope_type")) for parameters in each}
