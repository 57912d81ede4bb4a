"""The engine as a person uses it: text, chats or segments in, answers in the order asked.

    engine = Engine.from_pretrained(source, mask="segment", dtype="float32")
    engine.generate(["Once upon a time"], SamplingParams(max_tokens=32))
    engine.loglikelihood([("The sky is", " blue"), ("The sky is", " green")])

Knows prompts and models; batching is `workers/engine_core.py`. No Ray, no storage.
"""

import datetime
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attention.segments import Segment
from workers.engine_core import EngineConfig, EngineCore, last_hidden
from workers.model import TreeModel, load_model
from workers.pairs import PairEncoder
from workers.prompt_encoder import PromptEncoder
from workers.prompts import PromptTemplate
from workers.request import RequestOutput, Score
from workers.sampling import SamplingParams
from workers.stats import EngineStats

__all__ = ["Engine", "EngineConfig", "EngineStats", "Prompt"]

Prompt = str | Sequence[dict[str, Any]] | Sequence[Segment]


class Engine(EngineCore):
    """One model on one device, in process."""

    def __init__(self, model: TreeModel, config: EngineConfig | None = None) -> None:
        super().__init__(model, config)
        self._encoder: PromptEncoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        mask: Literal["segment", "causal"] = "causal",
        dtype: str = "auto",
        adapter: str | None = None,
        revision: str | None = None,
        **config: Any,
    ) -> "Engine":
        """Load a model (see `workers.model_source` for what a source may be). Raises ModelRefused with the reason."""
        model = load_model(source, dtype=dtype, adapter=adapter, revision=revision)
        return cls(model, EngineConfig(mask=mask, **config))

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answers in the order of `prompts`. A prompt is text, chat messages, or segments of token ids."""
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"as many sampling params as prompts wanted ({len(prompts)}), got {len(each)}")
        chains = [self._chain(prompt) for prompt in prompts]
        for index in _tree_order(chains):
            self.add(index, chains[index], each[index], random_key=str(index).encode())
        outputs: dict[Hashable, RequestOutput] = {}
        while self.has_work:
            outputs.update((output.request_id, output) for output in self.step())
        return [outputs[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """`[N, V]` fp32, at each prompt's last token. Raises RowError for a prompt that cannot run."""
        chains = [self._chain(prompt) for prompt in prompts]
        rows: dict[Hashable, Tensor] = {}
        for index in _tree_order(chains):
            self.add(index, chains[index], SamplingParams(max_tokens=1))
        while self.has_work:
            plan = self.scheduler.plan_step()
            for failed in [*self._refused, *self._take_failed()]:
                raise failed.error or RuntimeError("a failed row has an error")
            self._compute(plan)
            for prefill in plan.ready:
                rows[prefill.request.request_id] = self.model.logits(last_hidden(prefill)[None])[0]
                prefill.samples[0].finish_reason = "length"
                self.scheduler.start_decoding(prefill)
            self._count(plan)
        return torch.stack([rows[index] for index in range(len(prompts))])

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> list[Score]:
        """The log-likelihood of each continuation after its context, in the order of `pairs`.

        Strings are tokenised together, as lm-evaluation-harness does it: spaces at the end of the context belong to the
        continuation, and an empty context is the beginning-of-sequence (else end-of-sequence) token. A continuation may
        be token ids. Raises RowError for a pair that cannot be scored.
        """
        encoder = PairEncoder(self._prompt_encoder(), self.model.tokenizer)
        encoded = [encoder.encode(*pair) for pair in pairs]
        for index in _tree_order([[*context, Segment(rest, False)] for context, rest in encoded]):
            self.add_score(index, *encoded[index])
        scores: dict[Hashable, Score] = {}
        while self.has_work:
            for output in self.step():
                if output.score is None:
                    raise output.error or RuntimeError("a row that is not scored has an error")
                scores[output.request_id] = output.score
        return [scores[index] for index in range(len(pairs))]

    def _chain(self, prompt: Prompt) -> Sequence[Segment]:
        if not isinstance(prompt, str) and all(isinstance(part, Segment) for part in prompt):
            return prompt  # type: ignore[return-value]
        return self._prompt_encoder().encode_prompt(prompt)  # type: ignore[arg-type]

    def _prompt_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            self._encoder = PromptEncoder(self.model.tokenizer, PromptTemplate(), date=datetime.date.today())
        return self._encoder


def _tree_order(chains: Sequence[Sequence[Segment]]) -> list[int]:
    """Rows that share a beginning are run together, shorter prompts before their continuations."""
    return sorted(range(len(chains)), key=lambda i: [(s.bidirectional, s.token_ids) for s in chains[i]])
