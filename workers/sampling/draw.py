"""Draws the next token of many rows at once, each under its own parameters.

Randomness is counter-based: the uniform number for a draw is a hash of (seed, row, sample, position). So a row draws
the same tokens in any batch, order, unit or attempt. Knows logits and parameters; no tree, no text.

Shapes: `B` rows, `V` vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import TokenLogprobs
from segue.workers.sampling.bad_words import ends_of
from segue.workers.sampling.grammars import Grammar, forbidden_tokens
from segue.workers.sampling.sample import Sample
from segue.workers.sampling.vocabulary import summarise

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny
_ALL_FORBIDDEN = "the row's parameters forbid every token that could come next"


def uniform(seed: int, row_key: bytes, sample_index: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but these four."""
    counter = f"{seed}:{sample_index}:{position}:".encode() + row_key
    return (int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "big") >> 11) * 2.0**-53


def draw(
    logits: Tensor, samples: Sequence[Sample], *, seed: int, eos_token_ids: frozenset[int]
) -> list[int | RowError]:
    """One token for each row of `logits` `[B, V]`, or why there is none.

    A row has no token if its logits are not finite numbers, or if its parameters and its form together forbid every
    token. Samples that want log-probabilities get those of their token: the model's own, before any adjustment.
    """
    highest, most_likely, _ = summarise(logits)
    logprob_rows = _logprob_rows(logits, samples)
    adjusted = _adjust(logits, samples, eos_token_ids)
    errors = _errors(highest, adjusted.amax(dim=-1) if adjusted is not logits else None)
    tokens = (most_likely if adjusted is logits else adjusted.argmax(dim=-1)).tolist()
    random_rows = [i for i, s in enumerate(samples) if s.request.params.temperature > 0 and i not in errors]
    if random_rows:
        drawn = _draw_random(adjusted[random_rows].float(), [samples[i] for i in random_rows], seed)
        for row, token in zip(random_rows, drawn, strict=True):
            tokens[row] = token
    for row, logprobs in logprob_rows.items():
        if row not in errors:
            samples[row].logprobs.append(_token_logprobs(logprobs, tokens[row], samples[row].request.params))
    results: list[int | RowError] = list(tokens)
    for row, error in errors.items():
        results[row] = error
    return results


def _errors(highest: Tensor, highest_adjusted: Tensor | None) -> dict[int, RowError]:
    """Rows that cannot draw. `highest`: each row's largest logit, `[B]`; -inf after adjusting means that all are."""
    errors = {}
    if highest_adjusted is not None:
        for row in (~torch.isfinite(highest_adjusted)).nonzero()[:, 0].tolist():
            errors[row] = RowError(RowErrorCode.BAD_PARAMS, _ALL_FORBIDDEN)
    for row in (~torch.isfinite(highest)).nonzero()[:, 0].tolist():
        errors[row] = RowError(RowErrorCode.NUMERIC_ERROR, "the model gave logits that are not finite numbers")
    return errors


def _logprob_rows(logits: Tensor, samples: Sequence[Sample]) -> dict[int, Tensor]:
    return {
        row: logits[row].float().log_softmax(dim=-1)
        for row, sample in enumerate(samples)
        if sample.request.params.logprobs is not None
    }


def _token_logprobs(logprobs: Tensor, token: int, params: SamplingParams) -> TokenLogprobs:
    values, ids = logprobs.topk(min(params.logprobs or 0, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)


def _adjust(logits: Tensor, samples: Sequence[Sample], eos_token_ids: frozenset[int]) -> Tensor:
    """Penalties and forbidden tokens, in fp32. Copies only if some row asks for any."""
    needy = [row for row, sample in enumerate(samples) if _needs_adjustment(sample)]
    formed = {row: sample.grammar for row, sample in enumerate(samples) if sample.grammar is not None}
    if not needy and not formed:
        return logits
    adjusted = logits.to(torch.float32, copy=True)
    for row in needy:
        _adjust_row_(adjusted[row], samples[row], eos_token_ids)
    if formed:
        _keep_to_form_(adjusted, formed)
    return adjusted


def _keep_to_form_(logits: Tensor, grammars: Mapping[int, Grammar]) -> None:
    """logits `[B, V]`, changed in place: rows that have a grammar keep only the tokens that it allows."""
    forbidden = forbidden_tokens(list(grammars.values()), logits.shape[-1]).to(logits.device)
    if len(grammars) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        rows = torch.tensor(list(grammars), device=logits.device)
        logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)


def _needs_adjustment(sample: Sample) -> bool:
    p = sample.request.params
    has_penalty = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    names_tokens = bool(p.logit_bias or p.bad_words) or p.allowed_token_ids is not None
    return has_penalty or names_tokens or len(sample.token_ids) < p.min_tokens


def _adjust_row_(logits: Tensor, sample: Sample, eos_token_ids: frozenset[int]) -> None:
    """logits `[V]`, changed in place, in vLLM's order: forbidden tokens, bias, repetition, frequency, presence."""
    p = sample.request.params
    if p.allowed_token_ids is not None:
        forbidden = torch.ones(len(logits), dtype=torch.bool)
        forbidden[list(p.allowed_token_ids)] = False
        logits.masked_fill_(forbidden.to(logits.device), -torch.inf)
    if banned := _banned_tokens(sample, eos_token_ids):
        logits[sorted(token for token in banned if token < len(logits))] = -torch.inf
    if p.logit_bias:
        tokens, biases = zip(*p.logit_bias, strict=True)
        logits[list(tokens)] += torch.tensor(biases, device=logits.device)
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sample.request.prompt_token_ids, *sample.token_ids}), device=logits.device)
        logits[seen] = _penalised(logits[seen], p.repetition_penalty)
    if sample.token_ids and (p.frequency_penalty or p.presence_penalty):
        generated, counts = torch.tensor(sample.token_ids, device=logits.device).unique(return_counts=True)
        logits[generated] -= p.frequency_penalty * counts + p.presence_penalty


def _banned_tokens(sample: Sample, eos_token_ids: frozenset[int]) -> set[int]:
    """What would end a bad word, or the answer before it has `min_tokens`."""
    banned = ends_of(sample.request.bad_words, sample.token_ids)
    if len(sample.token_ids) < sample.request.params.min_tokens:
        banned |= {*eos_token_ids, *sample.request.params.stop_token_ids}
    return banned


def _penalised(scores: Tensor, penalty: float) -> Tensor:
    """However large the penalty, a finite score stays finite: it makes no token certain, and none impossible."""
    factor = min(max(penalty, _SMALLEST), _LARGEST)
    changed = torch.where(scores > 0, scores / factor, scores * factor).clamp(-_LARGEST, _LARGEST)
    return torch.where(torch.isfinite(scores), changed, scores)


def _draw_random(logits: Tensor, samples: Sequence[Sample], seed: int) -> list[int]:
    """Inverse transform sampling over the kept tokens, most likely first."""
    params = [sample.request.params for sample in samples]
    temperature = torch.tensor([min(p.temperature, _LARGEST) for p in params], device=logits.device)[:, None]
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # a quotient of these is never too large for fp32
    sorted_logits, order = (below_best / temperature).sort(dim=-1, descending=True, stable=True)
    probs = _keep_top(sorted_logits, params)
    cumulative = probs.double().cumsum(dim=-1)
    numbers = [_uniform_of(sample, seed) for sample in samples]
    uniforms = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]
    rank = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    rank = rank.minimum((probs > 0).sum(dim=-1, keepdim=True) - 1)  # rounding may point past the last kept token
    return order.gather(-1, rank)[:, 0].tolist()


def _keep_top(sorted_logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities `[B, V]`; tokens outside top_k, top_p and min_p, applied in this order, have 0."""
    size, device = sorted_logits.shape[-1], sorted_logits.device
    top_k = torch.tensor([min(p.top_k, size) if p.top_k > 0 else size for p in params], device=device)[:, None]
    sorted_logits = sorted_logits.masked_fill(torch.arange(size, device=device) >= top_k, -torch.inf)
    probs = sorted_logits.softmax(dim=-1)
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    before = probs.cumsum(dim=-1) - probs
    outside = (before >= top_p) & (top_p < 1.0)
    outside[:, 0] = False  # a top_p that is 0 in fp32 keeps the most likely token, too
    probs = probs.masked_fill(outside, 0.0)
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    return probs.masked_fill(probs < min_p * probs[:, :1], 0.0)


def _uniform_of(sample: Sample, seed: int) -> float:
    request = sample.request
    row_seed = request.params.seed if request.params.seed is not None else seed
    return uniform(row_seed, request.random_key, sample.index, len(sample.token_ids))
