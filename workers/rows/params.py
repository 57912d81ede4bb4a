"""The sampling parameters of a row, under vLLM's names.

Data only. The drawing is in `workers/sampling/draw.py`. Does not know models, logits or text.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.rows.forms import StructuredOutputs

LEAST_TEMPERATURE = 0.01  # of drawing, as in vLLM: below it, a quotient of logits is no number any more


def _temperature(value: float) -> float:
    return max(value, LEAST_TEMPERATURE) if value > 0 else value


def _seed(value: int | None) -> int | None:
    return None if value == -1 else value


MAX_BIAS = 100.0  # as OpenAI's and vLLM's


def _biases(value: object) -> object:
    """A mapping of token ids, which JSON writes as text, or pairs. A null stands for no bias."""
    if value is None:
        return ()
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, str):
        raise ValueError("wanted a mapping of token ids to numbers")
    found = [tuple(pair) if isinstance(pair, list) else pair for pair in pairs]
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in found):
        raise ValueError("wanted a mapping of token ids to numbers")
    return tuple((_from_text(token), bias) for token, bias in found if bias is not None)


def _from_text(token: object) -> object:
    return int(token) if isinstance(token, str) and _DIGITS.fullmatch(token) else token


def _clamped(biases: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """In one order, so that equal biases are equal parameters."""
    return tuple(sorted((token, max(-MAX_BIAS, min(MAX_BIAS, bias))) for token, bias in dict(biases).items()))


_DIGITS = re.compile("[0-9]{1,10}")
TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # a row's are compared with the model's vocabulary in the engine


class SamplingParams(BaseModel):
    """One row's sampling parameters; names, ranges and defaults are vLLM's, except that
    `temperature` defaults to 0 (greedy): an offline job should be repeatable unless asked otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    n: Annotated[int, Field(ge=1, le=1024)] = 1  # samples a row
    # 0 is greedy; anything between that and 0.01 is 0.01, as in vLLM
    temperature: Annotated[float, Field(ge=0.0), AfterValidator(_temperature)] = 0.0
    # only the most likely tokens that together have this probability
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0  # 0 and -1 mean all tokens
    # only tokens at least this likely, relative to the most likely one
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 16  # of the answer
    min_tokens: Annotated[int, Field(ge=0)] = 0  # no end-of-sequence or stop before this many
    # replaces the job's seed; a row's own seed decides its draws alone, whatever row it is; -1 is no seed
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(_seed)] | None = None
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_token_ids: tuple[TokenId, ...] = ()  # the answer ends at the first of these
    include_stop_str_in_output: bool = False  # keep what ended the answer in its text
    ignore_eos: bool = False  # an end-of-sequence token does not end the answer
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # top alternatives a token, beside the drawn one
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0  # above 1: tokens of prompt and answer become less likely
    # taken from the logits of tokens that the answer has
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0  # the same for each time
    # added to the logits of tokens: a mapping of token ids, from -100 to 100, beyond which it is one of these
    logit_bias: Annotated[
        tuple[tuple[TokenId, float], ...],
        BeforeValidator(_biases),
        AfterValidator(_clamped),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}, "default": {}}),
    ] = ()
    allowed_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)] | None = None  # only these are drawn
    bad_words: tuple[str, ...] = ()  # an answer has none of these words, compared token by token
    # only the last so many tokens of the prompt are used; -1: as many as leave room for max_tokens
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    skip_special_tokens: bool = True  # leave control tokens out of the text
    structured_outputs: StructuredOutputs | None = None  # the form that the answer must have

    @model_validator(mode="before")
    @classmethod
    def _accept_lists(cls, value: object) -> object:
        """YAML and JSON have lists, not tuples. A single stop may be a string."""
        if not isinstance(value, dict):
            return value
        fields = dict(value)
        if isinstance(fields.get("stop"), str):
            fields["stop"] = (fields["stop"],)
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        return fields

    @model_validator(mode="after")
    def _check_together(self) -> "SamplingParams":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if "" in self.stop:
            raise ValueError("stop must not contain an empty string")
        if not all(word.strip() for word in self.bad_words):
            raise ValueError("bad_words must not contain a blank string")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be at least 1, or -1, got 0")
        if self.structured_outputs is not None:
            self._check_structured()
        return self

    def _check_structured(self) -> None:
        """Refuse what would end the answer before its form is complete, or after it."""
        settings = {
            "min_tokens": self.min_tokens > 0,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens: false": not self.skip_special_tokens,
        }
        named = ", ".join(name for name, is_set in settings.items() if is_set)
        if named:
            raise ValueError(f"structured_outputs ends an answer by its form: leave out {named}")

    def max_prompt_tokens(self, max_model_len: int) -> int | None:
        """The tokens that a longer prompt is cut to; None if prompts are not cut."""
        if self.truncate_prompt_tokens == -1:
            return max(1, max_model_len - self.max_tokens)
        return self.truncate_prompt_tokens

    @property
    def named_token_ids(self) -> dict[str, tuple[int, ...]]:
        """The token ids in it that a model must have, by their parameter."""
        return {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": tuple(token for token, _ in self.logit_bias),
        }

    def with_row(self, overrides: dict[str, object] | None) -> "SamplingParams":
        """These parameters with a row's own on top. Raises RowError(BAD_PARAMS)."""
        if not overrides:
            return self
        unknown = overrides.keys() - SamplingParams.model_fields.keys()
        if unknown:  # their names are the row's own text, so they are not shown
            wanted = ", ".join(SamplingParams.model_fields)
            message = f"sampling_params has {len(unknown)} keys that are no parameters, wanted some of {wanted}"
            raise RowError(RowErrorCode.BAD_PARAMS, message)
        try:
            return SamplingParams.model_validate(self.model_dump() | overrides)
        except ValidationError as error:
            raise RowError(RowErrorCode.BAD_PARAMS, _first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    """The first problem, without the row's own words."""
    first = error.errors(include_input=False, include_url=False)[0]
    known = {*SamplingParams.model_fields, "json", "regex", "choice"}
    place = ".".join(
        ["sampling_params", *(str(part) for part in first["loc"] if isinstance(part, int) or part in known)]
    )
    if first["type"] == "extra_forbidden":
        return f"{place}: an unknown key, wanted json, regex or choice"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
