"""Which parameters a request may have, under the names of OpenAI and vLLM, and what Segue makes of them.

The sampling parameters are those of `SamplingParams`. Everything else is one of: taken under another name; without any
effect on the answer; known, and not supported. What is none of these is named as unknown. Knows names and values; no
model and no file.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from segue.pipeline.formats.openai.forms import FORMS, form_of
from segue.pipeline.formats.openai.messages import named, not_known
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.params import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS)
# Columns of a row's own that the chat template is told, under the names that a job's `prompt` has for them.
PROMPT_COLUMNS = tuple(
    name for name in ("tools", "chat_template_kwargs") if f"{name}_column" in PromptTemplate.model_fields
)
# OpenAI's defaults for parameters that a request leaves out; Segue's own differ.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}
_SAMPLING = frozenset(SamplingParams.model_fields) - {"logprobs", "structured_outputs"}
_TAKEN = frozenset({"messages", "prompt", "max_completion_tokens", "logprobs", "top_logprobs", *FORMS})
_CHANGES_NOTHING = frozenset(
    {"user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key",
     "prompt_cache_retention", "model", "request_id", "session_id", "priority", "cache_salt", "stream_interval",
     "guided_decoding_backend", "parallel_tool_calls", "truncation_side", "return_mm_kwargs"}
)  # fmt: skip
# Parameters that would change the answer and are not supported, and the values with which they would not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "chat_template_kwargs": ({},), "chat_template": (), "documents": ([],), "reasoning_effort": (),
    "include_reasoning": (True,), "thinking_token_budget": (-1,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "add_special_tokens": (), "echo": (False,), "suffix": ("",), "best_of": (1,),
    "stream": (False,), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "verbosity": (), "use_beam_search": (False,), "length_penalty": (1.0, 1), "early_stopping": (False,),
    "logit_bias": ({},), "bad_words": ([],), "allowed_token_ids": (), "prompt_logprobs": (), "logprob_token_ids": (),
    "truncate_prompt_tokens": (), "prompt_embeds": (), "spaces_between_special_tokens": (True,),
    "guided_whitespace_pattern": (), "return_tokens_as_token_ids": (False,), "return_token_ids": (False,),
    "return_prompt_text": (False,), "return_token_offsets": (False,), "routed_experts_prompt_start": (0,),
    "mm_processor_kwargs": ({},), "media_io_kwargs": ({},), "vllm_xargs": ({},), "logits_processors": ([],),
    "kv_transfer_params": ({},), "ec_transfer_params": ({},), "watermarking": (False,), "repetition_detection": (),
}  # fmt: skip
_EFFORT = ("reasoning_effort",) if "chat_template_kwargs" in PROMPT_COLUMNS else ()
_SUPPORTED = sorted({*_SAMPLING, *_TAKEN, *PROMPT_COLUMNS, *_EFFORT})
_KNOWN = sorted({*_SAMPLING, *_TAKEN, *_CHANGES_NOTHING, *_UNSUPPORTED})
_ENDPOINT_OF = dict.fromkeys(
    ("messages", "tools", "chat_template_kwargs", "reasoning_effort", "top_logprobs"), CHAT
) | {"prompt": COMPLETIONS}
_EMPTY = ([], {})  # of a list or mapping of vLLM's: says nothing


class BadParameter(ValueError):
    """What is wrong with a request; the message does not quote it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def given_parameters(body: Mapping[str, Any], endpoint: str) -> dict[str, Any]:
    """The body without nulls, which clients write for defaults, and without what changes nothing.

    Raises BadParameter for names that are not known, and for what is not supported.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in _CHANGES_NOTHING}
    for name in given:
        if name not in _KNOWN:
            raise BadParameter(named(name), not_known(name, _SUPPORTED))
    asked = {name: value for name, value in given.items() if not _says_nothing(name, value, endpoint)}
    for name, value in asked.items():
        if _ENDPOINT_OF.get(name, endpoint) != endpoint:
            raise BadParameter(name, f"is for {_ENDPOINT_OF[name]}")
        if name not in _SUPPORTED:
            raise BadParameter(name, _not_supported(name, value))
    return asked


def sampling_params(asked: Mapping[str, Any], endpoint: str) -> dict[str, Any]:
    """The sampling parameters under Segue's names, with OpenAI's defaults. Raises BadParameter.

    What depends on the job's own parameters, such as `min_tokens` above `max_tokens`, is found when rows are planned.
    """
    params = {name: value for name, value in asked.items() if name in _SAMPLING}
    if (limit := asked.get("max_completion_tokens")) is not None:
        params["max_tokens"] = limit
    if (logprobs := _logprobs(asked, endpoint)) is not None:
        params["logprobs"] = logprobs
    if (form := form_of(asked)) is not None:
        params["structured_outputs"] = form
    params = DEFAULTS | params
    _check_fields(json.loads(json.dumps(params)))  # as a row will have them
    return params


def template_arguments(asked: Mapping[str, Any]) -> dict[str, str]:
    """The columns for the chat template as JSON: tools, and arguments such as `enable_thinking`.

    Raises BadParameter.
    """
    found: dict[str, str] = {}
    if tools := asked.get("tools"):
        found["tools"] = json.dumps(_checked_tools(tools))
    kwargs = asked.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise BadParameter("chat_template_kwargs", "wanted an object")
    if (effort := asked.get("reasoning_effort")) is not None:  # as vLLM hands it over
        kwargs = {"reasoning_effort": effort, "enable_thinking": effort != "none"} | kwargs
    return found | ({"chat_template_kwargs": json.dumps(kwargs)} if kwargs else {})


def _says_nothing(name: str, value: Any, endpoint: str) -> bool:
    if name == "add_special_tokens":
        return value is (endpoint == COMPLETIONS)
    neutral = _UNSUPPORTED.get(name, _EMPTY if name in _SAMPLING else ())
    return any(type(value) is type(each) and value == each for each in neutral)


def _not_supported(name: str, value: Any) -> str:
    if name == "stream":
        return "true is not supported: a batch has no streams"
    if name == "tool_choice":
        kind = value if value in ("required",) else "a named function"
        return f"{kind} is not supported, only auto and none"
    return "not supported"


def _logprobs(asked: Mapping[str, Any], endpoint: str) -> int | None:
    """How many alternatives a token is wanted; None if no log-probabilities are."""
    logprobs, top = asked.get("logprobs"), asked.get("top_logprobs", 0)
    if endpoint == COMPLETIONS:
        if isinstance(logprobs, bool):
            raise BadParameter("logprobs", f"wanted an integer at {COMPLETIONS}, a boolean is for {CHAT}")
        return logprobs
    if not isinstance(logprobs, bool | None):
        raise BadParameter("logprobs", f"wanted true or false at {CHAT}; top_logprobs is the number")
    if top and not logprobs:
        raise BadParameter("top_logprobs", "needs logprobs: true")
    return top if logprobs else None


def _check_fields(params: dict[str, Any]) -> None:
    try:
        SamplingParams.model_validate(params)
    except ValidationError as error:
        for each in error.errors(include_input=False, include_url=False):
            if each["loc"]:
                place = ".".join(str(part) for part in each["loc"] if isinstance(part, int) or part in _SAYABLE)
                raise BadParameter(place, each["msg"].removeprefix("Value error, ")) from None


_SAYABLE = {*SamplingParams.model_fields, "json", "regex", "choice"}


def _checked_tools(tools: Any) -> list[Any]:
    if not isinstance(tools, list):
        raise BadParameter("tools", "wanted a list")
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadParameter(f"tools.{place}", "wanted an object")
        if tool.get("type", "function") != "function":
            raise BadParameter(f"tools.{place}", f"{named(tool['type'])} tools are not supported, only functions")
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadParameter(f"tools.{place}.function", "wanted an object with a name")
    return tools
