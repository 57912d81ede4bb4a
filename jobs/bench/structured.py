"""The cost of structured outputs: the same rows with a JSON schema, and without one but with as many tokens each.

    python -m segue.jobs.bench.structured

First every answer that stopped is checked against the schema. Both arms compute and draw the same numbers of tokens in
the same steps, so the ratio of their times is the cost of the schema. The masks are also timed by themselves.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from segue.jobs.bench.machine import SOURCE, machine, say
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.rows.forms import StructuredOutputs
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import RequestOutput
from segue.workers.sampling.grammars import Grammars, forbidden_tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "category": {"enum": ["billing", "bug", "question"]},
        "urgency": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "is_angry": {"type": "boolean"}},
            "required": ["name", "is_angry"],
            "additionalProperties": False,
        },
    },
    "required": ["category", "urgency", "tags", "customer"],
    "additionalProperties": False,
}
FORM = StructuredOutputs.model_validate({"json": SCHEMA})
PRODUCTS = ("kettle", "lamp", "router", "printer", "chair")


def main() -> None:
    args = _arguments()
    model = load_model(SOURCE, dtype=args.dtype)
    prompts = [
        [{"role": "user", "content": f"Ticket {n}: the {PRODUCTS[n % 5]} of order {n} is broken. Describe it as JSON."}]
        for n in range(args.rows)
    ]
    formed = SamplingParams(max_tokens=args.max_tokens, structured_outputs=FORM)
    seconds: dict[str, list[float]] = {"formed": [], "free": []}
    outputs: list[RequestOutput] = []
    for _ in range(args.repeats):
        outputs, taken = _timed(Engine(model, EngineConfig(max_num_seqs=args.batch_size)), prompts, formed)
        seconds["formed"].append(taken)
        free = [SamplingParams(max_tokens=len(each.outputs[0].token_ids), ignore_eos=True) for each in outputs]
        same, taken = _timed(Engine(model, EngineConfig(max_num_seqs=args.batch_size)), prompts, free)
        seconds["free"].append(taken)
        if _num_tokens(same) != _num_tokens(outputs):
            raise SystemExit("wrong: the two arms drew different numbers of tokens")
    num_stopped = _check(outputs)
    grammars = Grammars(model.tokenizer, model.vocab_size, model.eos_token_ids)
    masks = _mask_seconds(grammars, outputs[: args.batch_size], model.vocab_size)
    speed = {arm: _num_tokens(outputs) / min(taken) for arm, taken in seconds.items()}
    ratio = min(seconds["formed"]) / min(seconds["free"])
    step_ms = statistics.mean(masks) * 1e3
    share = sum(masks) / min(seconds["formed"]) * args.rows / args.batch_size
    say(
        f"{num_stopped} of {args.rows} rows stopped, all valid; {speed['formed']:.1f} tokens/s with the schema, "
        f"{speed['free']:.1f} without: {ratio:.3f} times the time; masks, timed apart: {step_ms:.2f} ms a step, "
        f"{share:.1%} of the time"
    )
    report = {
        "benchmark": "structured",
        **machine(),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "rows": args.rows,
        "rows_stopped_and_valid": num_stopped,
        "tokens": _num_tokens(outputs),
        "seconds": seconds,
        "tokens_per_second": speed,
        "time_ratio": ratio,
        "mask_milliseconds_a_step": step_ms,
        "mask_share": share,
    }
    print(json.dumps(report))


def _timed(engine: Engine, prompts: Sequence[Any], params: Any) -> tuple[list[RequestOutput], float]:
    engine.generate(
        prompts[:1], SamplingParams(max_tokens=1, structured_outputs=FORM)
    )  # work that is done once in a process
    started = time.perf_counter()
    outputs = engine.generate(prompts, params)
    return outputs, time.perf_counter() - started


def _num_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _check(outputs: Sequence[RequestOutput]) -> int:
    """The number of answers that stopped. Raises if one of them does not fit the schema."""
    from jsonschema import validate  # Ray brings it

    stopped = [output.outputs[0] for output in outputs if output.outputs[0].finish_reason == "stop"]
    for answer in stopped:
        validate(json.loads(answer.text), SCHEMA)
    return len(stopped)


def _mask_seconds(grammars: Grammars, outputs: Sequence[RequestOutput], vocab_size: int) -> list[float]:
    """The time of the masks in each step of a batch that draws these answers."""
    taken = []
    rows = [(grammars.begin(FORM), output.outputs[0].token_ids) for output in outputs]
    for position in range(max(len(tokens) for _, tokens in rows)):
        active = [(grammar, tokens[position]) for grammar, tokens in rows if position < len(tokens)]
        started = time.perf_counter()
        forbidden_tokens([grammar for grammar, _ in active], vocab_size)
        taken.append(time.perf_counter() - started)
        for grammar, token in active:
            grammar.accept(token)
    return taken


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the cost of JSON-schema answers")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
