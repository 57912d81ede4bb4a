"""What is wrong with a job, as values that can be collected and shown all at once, and what its cluster failed with.

Knows nothing of YAML, Parquet or Ray. A printed problem is one line and never shows a credential.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_SHOWN_CHARS = 80
SHOWN_FIRST_CHARS = 27  # of a longer one
MAX_MESSAGE_CHARS = 600
_USER_INFO = re.compile(r"(?<=//)[^/@\s]*@")
_SECRET_FIELD = re.compile(r"(?i)([?&][\w-]*(?:signature|token|secret|password|credential)[\w-]*=)[^&\s]*")
_SECRET_HEADER = re.compile(r"(?i)((?:authorization|x-amz-security-token)['\"]?\s*[:=]\s*)[^\r\n]*|\bbearer\s+\S+")
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse a job."""

    key: str  # dotted path in the job file, e.g. "sampling_params.temperature"; "" is the file as a whole
    got: str  # what is there, ready to print; "" when `wanted` already says it
    wanted: str  # what would be accepted
    hint: str = ""  # the way out, e.g. "did you mean max_tokens?"
    where: str = ""  # "job.yaml:12", or "--set"

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.key) if part)
        body = f"got {self.got}, wanted {self.wanted}" if self.got else self.wanted
        line = f"{place}: {body}" + (f" ({self.hint})" if self.hint else "")
        return redact(one_line(line))


class ClusterUnavailable(RuntimeError):
    """Ray could not be started or joined."""


class WorkersFailed(RuntimeError):
    """Tasks or workers cannot do the work; the message has the first cause, in one line."""


class JobRefused(ValueError):
    """The job must not start; `problems` holds every reason found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["JobRefused"], tuple[tuple[Problem, ...]]]:
        return (JobRefused, (self.problems,))


def shown(value: object) -> str:
    """A value as an error shows it: short, and without what a container holds."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"  # Python refuses to print more than 4,300 digits
    text = repr(value) if isinstance(value, str | int | float) else f"the {type(value).__name__} {value}"
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    return f"{text[:SHOWN_FIRST_CHARS]}...{text[SHOWN_FIRST_CHARS + 3 - MAX_SHOWN_CHARS :]}"  # a path's end is its name


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint naming the candidates closest to `name`, those that differ only in case first; "" if none is close."""
    names = sorted(set(candidates) - {name})
    same_but_case = [other for other in names if other.casefold() == name.casefold()]
    close = same_but_case or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(other) for other in close)}?" if close else ""


def has_credentials(url: str) -> bool:
    """Whether a URL carries a user, password, token or signature."""
    return bool(_USER_INFO.search(url) or _SECRET_FIELD.search(url))


def redact(text: str) -> str:
    """The text with user names, passwords and signatures in URLs, headers that authorise, and AWS key ids blanked."""
    text = _SECRET_FIELD.sub(r"\1***", _USER_INFO.sub("***@", text))
    return _KEY_ID.sub("***", _SECRET_HEADER.sub(r"\1***", text))


def one_line(text: str) -> str:
    """The text without line breaks or control characters: names of files and keys are not to be trusted."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def first_and_last_line(message: str) -> str:
    """What a log shows of another library's error: its first line and its last, at most 600 characters."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no message"]
    line = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return line[:MAX_MESSAGE_CHARS]
