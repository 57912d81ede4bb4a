"""Log-likelihoods of ARC-Easy choices, eight-shot: Segue, lm-evaluation-harness' HF backend and vLLM in one run.

    python -m segue.jobs.bench.score --data ../shared/data/commonsense
    python -m segue.jobs.bench.score --data ... --check 200 --repeats 0     every value against lm-evaluation-harness
    python -m segue.jobs.bench.score --data ... --vllm-python VENV/bin/python --repeats 1

First the answers are checked in fp32. Then both are timed in turn, with tokenisation, the peer at its best batch size,
and the medians are compared. The limit is the time of the model's own matrix products at this machine's rate for
their shapes. Needs the extra `peers`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segue.jobs.bench.arc import Question, workload
from segue.jobs.bench.machine import PREFILL_TOKENS, SOURCE, body_seconds, head_seconds, machine, say, seconds_of
from segue.jobs.bench.peers import LmEval, Vllm
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.request import Score

TOLERANCE = 1e-3  # of a log-likelihood, fp32
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
ODD_PAIRS = [  # one token, white space at the join, several bytes a character, no context
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),
    ("tab\t", " z"),
    ("one two", " "),
    ("Der Fluss heißt", " Süßwasser-Kanal 🌊 größer"),
    ("日本の首都は", "東京です。"),
    ("", "Paris is big"),
]
Pairs = Sequence[tuple[str, str]]


def main() -> None:
    args = _arguments()
    directory = str(safetensors_directory(locate(SOURCE)))
    questions, pairs = workload(args.data, args.questions)
    report: dict[str, Any] = {"benchmark": "score", **machine(), "questions": len(questions), "requests": len(pairs)}
    report |= _check(directory, questions, pairs, args.check)
    if args.repeats:
        report |= _timed(directory, pairs, args.repeats, args.dtype, args.batch_size)
    if args.vllm_python:
        report |= _vllm(args.vllm_python, directory, pairs, args.dtype, report.get("segue_requests_per_s"))
    print(json.dumps(report))


def _check(directory: str, questions: Sequence[Question], pairs: Pairs, num_checked: int) -> dict[str, Any]:
    """Compare the first questions and ODD_PAIRS with lm-evaluation-harness in fp32, and our bf16 with our fp32."""
    model = load_model(directory, dtype="float32")
    ours = _fresh(model).loglikelihood(pairs)
    chosen = [*pairs[: 4 * num_checked], *ODD_PAIRS]
    wanted = LmEval(directory, "float32").scores(chosen, 4)
    got = [*ours[: 4 * num_checked], *_fresh(model).loglikelihood(ODD_PAIRS)]
    errors = [abs(score.logprob - logprob) for score, (logprob, _) in zip(got, wanted, strict=True)]
    greedy = sum(score.is_greedy == is_greedy for score, (_, is_greedy) in zip(got, wanted, strict=True))
    theirs = [Score(logprob, 0, is_greedy) for logprob, is_greedy in wanted[: 4 * num_checked]]
    ours_acc, their_acc = _accuracy(questions[:num_checked], ours), _accuracy(questions[:num_checked], theirs)
    if max(errors) > TOLERANCE or greedy != len(got) or ours_acc != their_acc:
        raise SystemExit(f"wrong answers: max error {max(errors)}, greedy equal {greedy} of {len(got)}")
    low = _fresh(load_model(directory, dtype="bfloat16")).loglikelihood(pairs)
    in_bf16 = [abs(a.logprob - b.logprob) for a, b in zip(low, ours, strict=True)]
    found = {
        "checked_requests": len(got),
        "max_error_fp32": max(errors),
        "is_greedy_equal": greedy,
        "acc_fp32": _accuracy(questions, ours)[0],
        "acc_norm_fp32": _accuracy(questions, ours)[1],
        "acc_bf16": _accuracy(questions, low)[0],
        "acc_norm_bf16": _accuracy(questions, low)[1],
        "bf16_max_difference": max(in_bf16),
        "bf16_mean_difference": statistics.mean(in_bf16),
    }
    say(
        f"checked {len(got)} requests in fp32: max error {max(errors):.1e}, is_greedy equal in {greedy}; "
        f"acc and acc_norm of {num_checked} questions equal {ours_acc}"
    )
    say(f"bf16 against fp32: max difference {max(in_bf16):.3f}, mean {statistics.mean(in_bf16):.4f}")
    return found


def _timed(directory: str, pairs: Pairs, repeats: int, dtype: str, batch_size: int | None) -> dict[str, Any]:
    """The medians of runs in turn."""
    model, peer = load_model(directory, dtype=dtype), LmEval(directory, dtype)
    _fresh(model).loglikelihood(pairs[:64])
    batch_size = batch_size or _best_batch_size(peer, pairs)
    ours, theirs, engine = [], [], _fresh(model)
    for _ in range(repeats):
        engine = _fresh(model)
        ours.append(seconds_of(lambda engine=engine: engine.loglikelihood(pairs)))
        theirs.append(seconds_of(lambda: peer.scores(pairs, batch_size)))
        say(f"segue {len(pairs) / ours[-1]:.1f} requests/s, lm-eval {len(pairs) / theirs[-1]:.2f}")
    rate, peer_rate = len(pairs) / statistics.median(ours), len(pairs) / statistics.median(theirs)
    limit = len(pairs) / _least_seconds(model, engine)
    say(
        f"medians of {repeats}: {rate:.1f} requests/s against {peer_rate:.2f} (batches of {batch_size}): "
        f"{rate / peer_rate:.1f} times; {rate / limit:.0%} of the {limit:.0f} that the matrix products allow"
    )
    say(f"tokens computed {engine.stats.num_computed_tokens:,} of {engine.stats.num_prompt_tokens:,} requested")
    return {
        "dtype": dtype,
        "repeats": repeats,
        "tokens_computed": engine.stats.num_computed_tokens,
        "tokens_requested": engine.stats.num_prompt_tokens,
        "segue_seconds": ours,
        "lm_eval_seconds": theirs,
        "lm_eval_batch_size": batch_size,
        "segue_requests_per_s": rate,
        "lm_eval_requests_per_s": peer_rate,
        "times_lm_eval": rate / peer_rate,
        "limit_requests_per_s": limit,
        "share_of_limit": rate / limit,
    }


def _best_batch_size(peer: LmEval, pairs: Pairs) -> int:
    """Measured on a tenth of the requests, after a warm-up."""
    some = pairs[: max(32, len(pairs) // 10)]
    peer.scores(some[:8], 4)
    seconds = {size: seconds_of(lambda size=size: peer.scores(some, size)) for size in BATCH_SIZES}
    say("lm-eval requests/s by batch size: " + ", ".join(f"{n}: {len(some) / s:.2f}" for n, s in seconds.items()))
    return min(seconds, key=lambda size: seconds[size])


def _vllm(python: str, directory: str, pairs: Pairs, dtype: str, our_rate: float | None) -> dict[str, Any]:
    """One run of vLLM in its own environment, after a warm-up."""
    try:
        with Vllm(python, directory, dtype) as peer:
            peer.score(pairs[:8])
            seconds, _ = peer.score(pairs)
    except RuntimeError as error:
        say(str(error))
        return {"vllm_failed": True}  # keeps what was measured before
    rate = len(pairs) / seconds
    say(f"vLLM {peer.version} prompt_logprobs: {rate:.2f} requests/s")
    result = {"vllm_version": peer.version, "vllm_seconds": seconds, "vllm_requests_per_s": rate}
    return result | ({"times_vllm": our_rate / rate} if our_rate else {})


def _least_seconds(model: TreeModel, engine: Engine) -> float:
    """The time of the tokens' matrix products at this machine's rate for their shapes."""
    stats = engine.stats
    body = stats.num_computed_tokens * body_seconds(model, PREFILL_TOKENS) / PREFILL_TOKENS
    return body + stats.num_scored_positions * head_seconds(model, 64) / 64


def _accuracy(questions: Sequence[Question], scores: Sequence[Score]) -> tuple[float, float]:
    """(acc, acc_norm) as lm-evaluation-harness defines them."""
    right = right_norm = start = 0
    for question in questions:
        logprobs = [score.logprob for score in scores[start : start + len(question.choices)]]
        normed = [logprob / len(choice) for logprob, choice in zip(logprobs, question.choices, strict=True)]
        right += logprobs.index(max(logprobs)) == question.label
        right_norm += normed.index(max(normed)) == question.label
        start += len(question.choices)
    return right / len(questions), right_norm / len(questions)


def _fresh(model: TreeModel) -> Engine:
    """An engine with an empty cache."""
    return Engine(model, EngineConfig(mask="causal"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="scoring against lm-evaluation-harness and vLLM")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the ARC-Easy files in LLM-Adapters' format"
    )
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument(
        "--check", type=int, default=10, help="questions compared with lm-evaluation-harness, one by one"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="of lm-evaluation-harness; the fastest if not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM, to time it once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
