"""Training adapters: Segue's loop under both masks against a plain loop over transformers and PEFT, in one run.

    python -m segue.jobs.bench.train
    python -m segue.jobs.bench.train --steps 12 --dtype float32

Both train the same adapters of the embedded model on the same batches: prompts of a hundred to a few hundred tokens
with short answers. First the loss and the gradients of one step are compared in fp32. Then both are timed in turn, a
step at a time, and their medians are compared. The limit is the time of the model's own matrix products, forward and
backward through frozen weights, at this machine's rate for their shapes.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from random import Random
from typing import Any

import torch

from segue.attention.segments import Segment, canonical_segments
from segue.jobs.bench.machine import SOURCE, linear_rate, machine, say, seconds_of
from segue.workers.devices.devices import DTYPES
from segue.workers.devices.memory import keep_freed_memory
from segue.workers.models.load import load_weights
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.models.support import checked_config
from segue.workers.training.batches import TrainingExample, forward_passes
from segue.workers.training.model import TrainingModel
from segue.workers.training.params import LoraParams

LORA = LoraParams(dropout=0.0)
BATCH_SIZE, MAX_TOKENS = 16, 4096
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative, fp32


class PlainLoop:
    """The usual loop with transformers and PEFT: padded batches, labels, the model's own loss, causal attention."""

    def __init__(self, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model

        directory = safetensors_directory(locate(SOURCE))
        config, _ = checked_config(directory)
        model = load_weights(directory, config, dtype)
        model.set_attn_implementation("sdpa")
        lora = LoraConfig(
            r=LORA.r,
            lora_alpha=LORA.alpha,  # type: ignore[arg-type]
            target_modules=list(LORA.target_modules),
            task_type="CAUSAL_LM",
        )
        self.model: Any = get_peft_model(model, lora)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def backward(self, examples: Sequence[TrainingExample]) -> float:
        """Gradients of the mean loss of the answers' tokens, and that loss."""
        total = sum(len(example.answer) for example in examples)
        loss = 0.0
        for batch in forward_passes(examples, MAX_TOKENS):
            tokens = [[*_prompt(example), *example.answer] for example in batch]
            longest = max(map(len, tokens))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
            real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
            labels = torch.full_like(ids, -100)
            for row, example in enumerate(batch):
                stop = len(tokens[row])
                labels[row, stop - len(example.answer) : stop] = torch.tensor(example.answer)
            out = self.model(input_ids=ids, attention_mask=real, labels=labels, num_items_in_batch=torch.tensor(total))
            out.loss.backward()
            loss += float(out.loss.detach())
        return loss


class SegueLoop:
    """The same loop with `segue.workers.training.model`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._model = TrainingModel.from_pretrained(SOURCE, LORA, dtype=dtype)
        self._model.train(True)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return self._model.trainable

    def backward(self, examples: Sequence[TrainingExample]) -> float:
        total = sum(len(example.answer) for example in examples)
        loss = 0.0
        for batch in forward_passes(examples, MAX_TOKENS):
            part = -self._model.logprobs(batch).sum() / total
            part.backward()
            loss += float(part.detach())
        return loss


def main() -> None:
    arguments = _arguments()
    keep_freed_memory()  # helps both; a usual loop does not do it
    batches = [_examples(step) for step in range(arguments.steps)]
    result: dict[str, Any] = {"benchmark": "train", **machine(), "steps": arguments.steps, "dtype": arguments.dtype}
    result |= _check(batches[0])
    plain, segue = PlainLoop(DTYPES[arguments.dtype]), SegueLoop(DTYPES[arguments.dtype])
    rates: dict[str, list[float]] = {"plain_causal": [], "segue_causal": [], "segue_segment": []}
    for number, batch in enumerate([batches[0], *batches]):  # the first is a warm-up
        causal = [TrainingExample(canonical_segments(e.segments, mask="causal"), e.answer) for e in batch]
        tokens = sum(example.num_fed_tokens for example in batch)
        works = (lambda: plain.backward(causal), lambda: segue.backward(causal), lambda: segue.backward(batch))  # noqa: B023
        for name, work in zip(rates, works, strict=True):
            seconds = seconds_of(work)
            if number:
                rates[name].append(tokens / seconds)
        for loop in (plain, segue):
            for parameter in loop.trainable.values():
                parameter.grad = None
    medians = {name: statistics.median(values) for name, values in rates.items()}
    limit = _limit(segue, DTYPES[arguments.dtype])
    for name, rate in medians.items():
        times = rate / medians["plain_causal"]
        say(f"{name}: {rate:,.0f} tokens/s, {times:.2f} times the plain loop, {rate / limit:.0%} of the limit")
    result |= {f"{name}_tokens_per_s": rate for name, rate in medians.items()}
    result |= {"tokens_per_step": sum(e.num_fed_tokens for e in batches[0]), "limit_tokens_per_s": limit}
    result |= {
        f"{name}_times_plain": medians[name] / medians["plain_causal"] for name in ("segue_causal", "segue_segment")
    }
    print(json.dumps(result))


def _check(batch: Sequence[TrainingExample]) -> dict[str, float]:
    """Compare loss and gradients of both loops in fp32 with the same adapters. Ends the program if they differ."""
    plain, segue = PlainLoop(torch.float32), SegueLoop(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in segue.trainable.items():
            parameter.normal_(0, 0.02)
            plain.trainable[name].copy_(parameter)
    causal = [TrainingExample(canonical_segments(e.segments, mask="causal"), e.answer) for e in batch]
    losses = [loop.backward(causal) for loop in (plain, segue)]
    errors = []
    for name, parameter in segue.trainable.items():
        wanted = plain.trainable[name].grad
        if wanted is None or parameter.grad is None:
            raise SystemExit(f"{name} has no gradient")
        errors.append(float((parameter.grad - wanted).norm() / wanted.norm()))
    if abs(losses[0] - losses[1]) > LOSS_TOLERANCE * losses[0] or max(errors) > GRADIENT_TOLERANCE:
        raise SystemExit(f"losses {losses} and gradients (error {max(errors):.1e}) should be equal")
    say(f"checked one step in fp32: losses {losses[0]:.5f} and {losses[1]:.5f}, gradients within {max(errors):.1e}")
    return {"loss_error_fp32": abs(losses[0] - losses[1]), "max_gradient_error_fp32": max(errors)}


def _examples(step: int) -> list[TrainingExample]:
    """Random tokens, since their meaning does not change the time: system message, user message, header and answer."""
    random = Random(step)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(random.randrange(100, 49_000) for _ in range(random.randint(low, high)))

    return [
        TrainingExample(
            (Segment(tokens(30, 60), True), Segment(tokens(60, 300), True), Segment(tokens(3, 3), False)),
            tokens(16, 64),
        )
        for _ in range(BATCH_SIZE)
    ]


def _prompt(example: TrainingExample) -> list[int]:
    return [token for segment in example.segments for token in segment.token_ids]


def _limit(segue: SegueLoop, dtype: torch.dtype) -> float:
    """Tokens/s if only the products with the layers' frozen weights took time, once forward and once backward."""
    layers = [
        each
        for name, each in segue._model.peft.named_modules()
        if isinstance(each, torch.nn.Linear) and "lora" not in name and "lm_head" not in name
    ]
    shapes = {each.weight.shape for each in layers}
    seconds = {shape: 2 * shape.numel() / linear_rate(shape, dtype) for shape in shapes}
    return 1 / sum(2 * seconds[each.weight.shape] for each in layers)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="training adapters against a plain transformers and PEFT loop")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
