"""One request of a batch file in OpenAI's format: what it asks for, in Segue's terms, or what is wrong with it.

Requests are private: messages name parameters, and quote nothing else. Knows the format; no file, no model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from segue.pipeline.formats.openai.forms import BadForm
from segue.pipeline.formats.openai.messages import Message, named, not_known
from segue.pipeline.formats.openai.parameters import (
    CHAT,
    ENDPOINTS,
    BadParameter,
    given_parameters,
    sampling_params,
    template_arguments,
)

_MESSAGES = TypeAdapter(list[Message])


class BadRequest(ValueError):
    """A line that cannot be answered; the message does not quote it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param  # the parameter that is wrong, as OpenAI's errors have it


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line that is a JSON object. Its members may be missing, or of any type."""

    members: Mapping[str, Any]

    @property
    def custom_id(self) -> str | None:
        """None if it is no name."""
        found = self.members.get("custom_id")
        return found if isinstance(found, str) and found else None

    @property
    def url(self) -> Any:
        return self.members.get("url")


def parse_line(raw: bytes) -> RequestLine:
    """Raises BadRequest for what is no JSON object, or has half of a surrogate pair."""
    try:
        value = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError:
        raise BadRequest("the line is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise BadRequest("the line is not a JSON object")
    return RequestLine(value)


def asked_by(line: RequestLine, endpoint: str) -> dict[str, Any]:
    """The columns of the request: messages or prompt, sampling parameters and what the template is told, as JSON.

    Raises BadRequest.
    """
    _check_members(line, endpoint)
    try:
        asked = given_parameters(line.members["body"], endpoint)
        prompt = {"messages": _messages(asked)} if endpoint == CHAT else {"prompt": _prompt(asked)}
        params = json.dumps(sampling_params(asked, endpoint))
        return prompt | {"sampling_params": params} | template_arguments(asked)
    except BadParameter as error:
        raise BadRequest(str(error), error.name) from None
    except BadForm as error:
        raise BadRequest(str(error), str(error).partition(":")[0]) from None


def _check_members(line: RequestLine, endpoint: str) -> None:
    if line.custom_id is None:
        raise BadRequest("custom_id: wanted a text that is not empty", "custom_id")
    if line.members.get("method", "POST") != "POST":
        raise BadRequest("method: wanted POST", "method")
    if line.url != endpoint:
        wanted = f"{endpoint}, as in the first line that has an endpoint"
        raise BadRequest(f"url: wanted {wanted if line.url in ENDPOINTS else ' or '.join(ENDPOINTS)}", "url")
    if not isinstance(line.members.get("body"), dict):
        raise BadRequest("body: wanted an object", "body")


def _messages(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(asked.get("messages"), list) or not asked["messages"]:
        raise BadParameter("messages", "wanted a list of at least one message")
    try:
        return [message.value() for message in _MESSAGES.validate_python(_without_nulls(asked["messages"]))]
    except ValidationError as error:
        raise _bad_message(error) from None


def _without_nulls(messages: list[Any]) -> list[Any]:
    """Clients write null for what a message does not have."""
    is_given = lambda pair: pair[1] is not None  # noqa: E731
    return [dict(filter(is_given, each.items())) if isinstance(each, dict) else each for each in messages]


def _bad_message(error: ValidationError) -> BadParameter:
    """The first thing that is wrong with the messages."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) if isinstance(part, int) else named(part) for part in ("messages", *first["loc"]))
    if first["type"] == "extra_forbidden":
        return BadParameter(place, not_known(first["loc"][-1], list(Message.model_fields)))
    return BadParameter(place, first["msg"].removeprefix("Value error, "))


def _prompt(asked: Mapping[str, Any]) -> str:
    prompt = asked.get("prompt")
    found = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if isinstance(found, str):
        return found
    if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
        raise BadParameter("prompt", "several texts in one request are not supported: write a line for each")
    what = "token ids are not supported, " if isinstance(found, list) and found else ""
    raise BadParameter("prompt", f"{what}wanted a text")
