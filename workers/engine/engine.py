"""The engine as a person uses it: text, chats or segments in, answers in the order asked.

    engine = Engine.from_pretrained(source, mask="segment", dtype="float32")
    engine.generate(["Once upon a time"], SamplingParams(max_tokens=32))
    engine.loglikelihood([("The sky is", " blue"), ("The sky is", " green")])

Knows prompts and models; batching is `workers/engine/core.py`. No Ray, no storage.
"""

import datetime
from collections.abc import Hashable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from segue.attention.segments import Segment, canonical_segments
from segue.workers.devices.names import Device, DeviceMap
from segue.workers.engine.coalescing import RequestCoalescer
from segue.workers.engine.core import EngineConfig, EngineCore, last_hidden
from segue.workers.engine.stats import EngineStats
from segue.workers.errors import ModelRefused, RowError
from segue.workers.models.adapter_record import AdapterRecord, load_record
from segue.workers.models.load import load_model
from segue.workers.models.tree_model import TreeModel
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest, RequestOutput, Score, ScoringRequest
from segue.workers.scoring.pairs import PairEncoder
from segue.workers.scoring.windows import rolling_requests, total_score

__all__ = ["Engine", "EngineConfig", "EngineStats", "Prompt"]

Prompt = str | Sequence[dict[str, Any]] | Sequence[Segment]


class Engine(EngineCore):
    """One model on one device, in process."""

    def __init__(self, model: TreeModel, config: EngineConfig | None = None) -> None:
        super().__init__(model, config)
        self._encoder: PromptEncoder | None = None
        self._chat_encoder: PromptEncoder | None = None
        self._adapter = AdapterRecord()  # what chats are checked against

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        mask: Literal["auto", "segment", "causal"] = "auto",
        dtype: str = "auto",
        adapter: str | None = None,
        check_adapter: bool = True,
        revision: str | None = None,
        device: Device = "auto",
        device_map: DeviceMap = None,
        quantization: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> "Engine":
        """Load a model (see `workers/models/source.py` for what a source may be).

        `mask="auto"` is what the adapter was trained with, else causal. Raises ModelRefused with the reason, another
        mask than the adapter's among them unless `check_adapter` is False. `device="auto"` is a GPU if there is one;
        `device_map="auto"` puts a model's layers on all of them. `quantization` is transformers' own configuration,
        with its `quant_method`: weights are made smaller as they are loaded.
        """
        record = (load_record(Path(adapter)) if adapter else None) or AdapterRecord()
        resolved = record.mask or "causal" if mask == "auto" else mask
        if check_adapter:
            _check_adapter(record, AdapterRecord(mask=resolved))
        model = load_model(
            source,
            dtype=dtype,
            adapter=adapter,
            revision=revision,
            device=device,
            device_map=device_map,
            quantization=quantization,
        )
        engine = cls(model, EngineConfig(mask=resolved, **config))
        engine._adapter = record if check_adapter else AdapterRecord()
        return engine

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answers in the order of `prompts`. A prompt is text, chat messages, or segments of token ids."""
        common = SamplingParams() if params is None else params
        each = [common] * len(prompts) if isinstance(common, SamplingParams) else list(common)
        if len(each) != len(prompts):
            raise ValueError(f"as many sampling params as prompts wanted ({len(prompts)}), got {len(each)}")
        chains = [self._chain(prompt) for prompt in prompts]
        for index in sorted(range(len(chains)), key=lambda i: _tree_order(chains[i])):
            self.add(index, GenerationRequest(chains[index], each[index], str(index).encode()))
        outputs: dict[Hashable, RequestOutput] = {}
        while self.has_work:
            outputs.update((output.request_id, output) for output in self.step())
        return [outputs[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """`[N, V]` fp32, at each prompt's last token. Raises RowError for a prompt that cannot run."""
        chains = [canonical_segments(self._chain(prompt), mask=self.config.mask) for prompt in prompts]
        first_with = {chain: index for index, chain in reversed(list(enumerate(chains)))}
        rows: dict[Hashable, Tensor] = {}
        for chain in sorted(first_with, key=_tree_order):
            self.add(first_with[chain], GenerationRequest(chain, SamplingParams(max_tokens=1), b""))
        errors: list[RowError] = []
        while self.has_work:
            plan = self.scheduler.plan_step()
            errors += [output.error for output in (*self._refused, *self._take_failed()) if output.error]
            self._refused = []
            self._compute(plan)
            for prefill in plan.ready:
                rows[prefill.request.request_id] = self.model.logits(last_hidden(prefill)[None])[0]
                prefill.samples[0].finish_reason = "length"
                self.scheduler.start_decoding(prefill)
            self._count(plan)
        self._coalescer = RequestCoalescer()
        if errors:
            raise errors[0]
        return torch.stack([rows[first_with[chain]] for chain in chains])

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> list[Score]:
        """The log-likelihood of each continuation after its context, in the order of `pairs`.

        Strings are tokenised together, as lm-evaluation-harness does it: spaces at the end of the context belong to the
        continuation, and an empty context is the beginning-of-sequence (else end-of-sequence) token. A continuation may
        be token ids. Raises RowError for a pair that cannot be scored.
        """
        encoder = PairEncoder(self._prompt_encoder(), self.model.tokenizer)
        # Chats are segments before they are joined to anything.
        known = [(context if isinstance(context, str) else self._chain(context), text) for context, text in pairs]
        return self._scores([ScoringRequest(*pair) for pair in encoder.encode_all(known)])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[Score]:
        """The log-likelihood of each whole text, in windows of the context if it is longer than that.

        As lm-evaluation-harness does it: every token is predicted once, the first of a text from the prefix token, and
        later windows have one token of context. Raises RowError for a text without tokens.
        """
        encoder = PairEncoder(self._prompt_encoder(), self.model.tokenizer)
        windows = [list(rolling_requests(*encoder.encode_text(text), self.max_model_len)) for text in texts]
        scores = iter(self._scores([window for text in windows for window in text]))
        return [total_score(islice(scores, len(text))) for text in windows]

    def _scores(self, requests: Sequence[ScoringRequest]) -> list[Score]:
        """Raises RowError if a request has no score, once the others are done."""
        chains = [canonical_segments(request.fed_segments, mask=self.config.mask) for request in requests]
        for index in sorted(range(len(requests)), key=lambda i: _tree_order(chains[i])):
            self.add(index, requests[index])
        outputs: dict[Hashable, RequestOutput] = {}
        while self.has_work:
            outputs.update((output.request_id, output) for output in self.step())
        for index in range(len(requests)):
            if error := outputs[index].error:
                raise error
        return [score for index in range(len(requests)) if (score := outputs[index].score)]

    def _chain(self, prompt: Prompt) -> Sequence[Segment]:
        if not isinstance(prompt, str) and all(isinstance(part, Segment) for part in prompt):
            return prompt  # type: ignore[return-value]
        return self._encoder_of(prompt).encode_prompt(prompt)  # type: ignore[arg-type]

    def _encoder_of(self, prompt: Any) -> PromptEncoder:
        """Of a string, which needs no chat template, or of chat messages.

        Raises ModelRefused for chats that are put together otherwise than those the adapter was trained with.
        """
        if isinstance(prompt, str):
            return self._prompt_encoder()
        if self._chat_encoder is None:
            template = PromptTemplate(segment_by="part" if self._adapter.segment_by == "part" else "message")
            encoder = PromptEncoder(self.model.tokenizer, template, date=datetime.date.today())
            _check_adapter(self._adapter, encoder.record(self.config.mask))
            self._chat_encoder = encoder
        return self._chat_encoder

    def _prompt_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            template = PromptTemplate(format="text")
            self._encoder = PromptEncoder(self.model.tokenizer, template, date=datetime.date.today())
        return self._encoder


def _check_adapter(trained: AdapterRecord, used: AdapterRecord) -> None:
    differing = trained.differences(used)
    if differing:
        raise ModelRefused(f"the adapter wants another use: {differing[0]}; check_adapter=False runs it all the same")


def _tree_order(chain: Sequence[Segment]) -> list[tuple[bool, Sequence[int]]]:
    """Sorts rows that share a beginning together, shorter prompts before their continuations."""
    return [(segment.bidirectional, segment.token_ids) for segment in chain]
