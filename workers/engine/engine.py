"""The engine as a person uses it: text, chats or segments in, answers in the order asked.

    engine = Engine.from_pretrained(source, mask="segment", dtype="float32")
    engine.generate(["Once upon a time"], SamplingParams(max_tokens=32))
    engine.loglikelihood([("The sky is", " blue"), ("The sky is", " green")])

Knows prompts and models; batching is `workers/engine/core.py`. No Ray, no storage.
"""

import datetime
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from segue.attention.segments import Segment, canonical_segments
from segue.workers.devices.names import Device, DeviceMap
from segue.workers.engine.config import EngineConfig
from segue.workers.engine.core import EngineCore
from segue.workers.engine.stats import EngineStats
from segue.workers.errors import ModelRefused, RowError
from segue.workers.models.adapter_record import AdapterRecord, load_record
from segue.workers.models.load import load_model
from segue.workers.models.tree_model import TreeModel
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.progress import Advance, UseTqdm, no_bar, progress_bar
from segue.workers.rows.prompts import Prompt, chats_of, prompts_of, read_prompt
from segue.workers.rows.request import (
    EngineRow,
    GenerationRequest,
    LogitsRequest,
    RequestOutput,
    Score,
    ScoringRequest,
)
from segue.workers.scoring.pairs import PairEncoder
from segue.workers.scoring.windows import rolling_requests, total_score

__all__ = ["Engine", "EngineConfig", "EngineStats", "Prompt"]

Params = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any] | None]


class Engine:
    """One model on one device, in process.

    After an exception or Ctrl-C in one of its methods it can still be used: rows of the interrupted call are dropped.
    """

    def __init__(self, model: TreeModel, config: EngineConfig | None = None) -> None:
        self.core = EngineCore(model, config)
        self.model = model
        self.config = self.core.config
        self.stats = self.core.stats
        self._unclaimed: list[RequestOutput] = []  # of rows that were added, finished while another call ran
        self._encoder: PromptEncoder | None = None
        self._chat_encoders: dict[str, PromptEncoder] = {}  # by their template
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

        `mask="auto"` is the mask that the adapter was trained with, and causal without one. `device="auto"` is a GPU if
        there is one; `device_map="auto"` puts a model's layers on all GPUs. `quantization` is transformers' own
        configuration, with its `quant_method`: weights are quantised while they are loaded. Raises ModelRefused with
        the reason. One reason is another mask than the adapter's, unless `check_adapter` is False.
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
        self,
        prompts: Prompt | Iterable[Prompt],
        params: Params | None = None,
        *,
        sampling_params: Params | None = None,
        use_tqdm: UseTqdm = False,
    ) -> list[RequestOutput]:
        """Answers in the order of `prompts`, which is one prompt or many, as in vLLM.

        One prompt is a text, `{"prompt": text}`, a list of token ids, `{"prompt_token_ids": ids}`, a list of chat
        messages, or a list of segments. Parameters are the same for all prompts or one for each; a mapping is taken as
        `SamplingParams(**mapping)`. `sampling_params` is vLLM's name for `params`. A prompt that cannot run, and a row
        whose own parameters are wrong, is an output with `error`.
        """
        return self._answers(prompts_of(prompts), _one_of(params, sampling_params), use_tqdm, self._read)

    def chat(
        self,
        messages: Sequence[Any],
        params: Params | None = None,
        *,
        sampling_params: Params | None = None,
        use_tqdm: UseTqdm = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers to one chat, which is a list of messages, or to many, in their order.

        `template`: keys of a job file's section `prompt`, such as `chat_template`, `chat_template_kwargs` and
        `continue_final_message`.
        """
        encoder = self._encoder_of_chats(**template)

        def read(chat: Any) -> tuple[str | None, Sequence[Segment]]:
            messages: Any = [chat] if isinstance(chat, str) else chat  # a text is no chat
            return None, encoder.encode_prompt(messages)

        return self._answers(chats_of(messages), _one_of(params, sampling_params), use_tqdm, read)

    def _answers(
        self,
        prompts: Sequence[Any],
        params: Params | None,
        use_tqdm: UseTqdm,
        read: Callable[[Any], tuple[str | None, Sequence[Segment]]],
    ) -> list[RequestOutput]:
        rows: list[EngineRow | RowError] = []
        texts: list[str | None] = []
        for prompt, own in zip(prompts, _params_of_each(params, len(prompts)), strict=True):
            text, row = _row(prompt, own, str(len(rows)).encode(), read)
            texts.append(text)
            rows.append(row)
        with progress_bar(use_tqdm, len(rows)) as advance:
            outputs = self._run(rows, advance)
        return [replace(output, prompt=text) for output, text in zip(outputs, texts, strict=True)]

    def logits(self, prompts: Prompt | Iterable[Prompt]) -> Tensor:
        """`[N, V]` fp32, at each prompt's last token. Raises RowError for a prompt that cannot run."""
        outputs = self._run([LogitsRequest(self._chain(prompt)) for prompt in prompts_of(prompts)])
        return torch.stack([logits for output in _answered(outputs) if (logits := output.logits) is not None])

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> list[Score]:
        """The log-likelihood of each continuation after its context, in the order of `pairs`.

        Context and continuation are tokenised together, as in lm-evaluation-harness: spaces at the end of the context
        belong to the continuation, and an empty context is the beginning-of-sequence token, or the end-of-sequence
        token if there is none. A continuation may be token ids. Raises RowError for a pair that cannot be scored.
        """
        encoder = PairEncoder(self._prompt_encoder(), self.model.tokenizer)
        # chats are encoded before anything is joined to them
        known = [(context if isinstance(context, str) else self._chain(context), text) for context, text in pairs]
        return self._scores([ScoringRequest(*pair) for pair in encoder.encode_all(known)])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[Score]:
        """The log-likelihood of each whole text; a text longer than the model's context is scored in windows.

        As in lm-evaluation-harness, every token is predicted once, the first token of a text is predicted from the
        prefix token, and later windows have one token of context. Raises RowError for a text without tokens.
        """
        encoder = PairEncoder(self._prompt_encoder(), self.model.tokenizer)
        windows = [list(rolling_requests(*encoder.encode_text(text), self.core.max_model_len)) for text in texts]
        scores = iter(self._scores([window for text in windows for window in text]))
        return [total_score(islice(scores, len(text))) for text in windows]

    def _scores(self, requests: Sequence[ScoringRequest]) -> list[Score]:
        """Raises RowError if a request has no score, once the others are done."""
        return [score for output in _answered(self._run(requests)) if (score := output.score)]

    # -- rows one by one, as the loop of a worker drives them

    @property
    def has_work(self) -> bool:
        return bool(self._unclaimed or self.core.has_work)

    def add(self, request_id: Hashable, row: EngineRow | LogitsRequest) -> None:
        """Queue a row; see EngineCore.add."""
        self.core.add(request_id, row)

    def step(self) -> list[RequestOutput]:
        """One forward pass; returns the rows that finished with it, or before it in another call's steps."""
        done = self.core.step()
        unclaimed, self._unclaimed = self._unclaimed, []
        return unclaimed + done

    def _run(
        self, rows: Sequence[EngineRow | LogitsRequest | RowError], advance: Advance = no_bar
    ) -> list[RequestOutput]:
        """Run rows to their end; their outputs, with their places in `rows` as ids, in this order.

        A row that is an error already is answered with it. `advance` is told how many rows have just finished. Ids
        inside the core are new for each call. However a call ends, none of its rows stays in the engine.
        """
        call = object()  # in no other row's id
        ids = [(call, index) for index in range(len(rows))]
        wanted = {*ids}
        can_run = {i: row for i, row in enumerate(rows) if not isinstance(row, RowError)}
        outputs: dict[Hashable, RequestOutput] = {
            ids[i]: RequestOutput(ids[i], [], 0, error=row) for i, row in enumerate(rows) if isinstance(row, RowError)
        }
        advance(len(outputs))
        try:
            for index in sorted(can_run, key=lambda i: self._tree_order(can_run[i])):
                self.core.add(ids[index], can_run[index])
            while len(outputs) < len(rows) and self.core.has_work:
                num_before = len(outputs)
                self._take(self.core.step(), wanted, outputs)
                advance(len(outputs) - num_before)
        finally:
            if len(outputs) < len(rows):
                self.core.abort(wanted)
        return [replace(outputs[request_id], request_id=index) for index, request_id in enumerate(ids)]

    def _take(
        self, done: Sequence[RequestOutput], wanted: Container[Hashable], outputs: dict[Hashable, RequestOutput]
    ) -> None:
        """Put the outputs of wanted rows into `outputs`; others wait for the next `step`."""
        for output in done:
            if output.request_id in wanted:
                outputs[output.request_id] = output
            else:
                self._unclaimed.append(output)

    def _tree_order(self, row: EngineRow | LogitsRequest) -> list[tuple[bool, Sequence[int]]]:
        """Sorts rows that share a beginning together, shorter prompts before their continuations."""
        fed = row.fed_segments if isinstance(row, ScoringRequest) else row.segments
        chain = canonical_segments(fed, mask=self.config.mask)
        return [(segment.bidirectional, segment.token_ids) for segment in chain]

    def _chain(self, prompt: Prompt) -> Sequence[Segment]:
        return self._read(prompt)[1]

    def _read(self, prompt: Any) -> tuple[str | None, Sequence[Segment]]:
        """The text that was given, if it was one, and the segments. Raises RowError."""
        given = read_prompt(prompt)
        if given.segments is not None:
            return given.text, given.segments
        if given.text is not None:
            return given.text, self._prompt_encoder().encode_prompt(given.text)
        return None, self._encoder_of_chats().encode_prompt(given.chat or ())

    def _encoder_of_chats(self, **options: Any) -> PromptEncoder:
        """Raises ModelRefused if chats would be encoded otherwise than those that the adapter was trained with."""
        segment_by = "part" if self._adapter.segment_by == "part" else "message"
        template = PromptTemplate(**{"segment_by": segment_by, **options})
        key = template.model_dump_json()
        if key not in self._chat_encoders:
            encoder = PromptEncoder(self.model.tokenizer, template, date=datetime.date.today())
            _check_adapter(self._adapter, encoder.record(self.config.mask))
            self._chat_encoders[key] = encoder
        return self._chat_encoders[key]

    def _prompt_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            template = PromptTemplate(format="text")
            self._encoder = PromptEncoder(self.model.tokenizer, template, date=datetime.date.today())
        return self._encoder


def _check_adapter(trained: AdapterRecord, used: AdapterRecord) -> None:
    differing = trained.differences(used)
    if differing:
        raise ModelRefused(f"the adapter wants another use: {differing[0]}; check_adapter=False runs it all the same")


def _answered(outputs: Sequence[RequestOutput]) -> Sequence[RequestOutput]:
    """Raises the first row's error, if there is one."""
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def _one_of(params: Params | None, sampling_params: Params | None) -> Params | None:
    if params is not None and sampling_params is not None:
        raise TypeError("params and sampling_params are two names of one argument: give one of them")
    return params if params is not None else sampling_params


def _params_of_each(params: Params | None, num_rows: int) -> Sequence[SamplingParams | Mapping[str, Any] | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_rows
    if isinstance(params, Mapping):
        return [SamplingParams.model_validate(dict(params))] * num_rows
    each: list[Any] = list(params) if isinstance(params, Sequence) and not isinstance(params, str) else [params]
    wrong = {type(own).__name__ for own in each if not isinstance(own, SamplingParams | Mapping | None)}
    if wrong:
        raise TypeError(f"sampling params wanted as segue.SamplingParams or mappings, got {', '.join(sorted(wrong))}")
    if len(each) != num_rows:
        raise ValueError(f"as many sampling params as prompts wanted ({num_rows}), got {len(each)}")
    return each


def _row(
    prompt: Any,
    params: SamplingParams | Mapping[str, Any] | None,
    key: bytes,
    read: Callable[[Any], tuple[str | None, Sequence[Segment]]],
) -> tuple[str | None, EngineRow | RowError]:
    """The text that was given, and the request, or why it is none. `key` names the row for its draws."""
    text = prompt if isinstance(prompt, str) else None
    try:
        own = params if isinstance(params, SamplingParams) else SamplingParams().with_row(dict(params or {}))
        text, segments = read(prompt)
        return text, GenerationRequest(segments, own, key if own.seed is None else b"")
    except RowError as error:
        return text, error
