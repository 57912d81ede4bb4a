"""What an adapter was trained for: `segue.json` beside its weights names the mask and the form of the prompts.

An adapter answers well under the mask and prompts of its training, and its weights do not show what these were. Knows
files; no weights, no tokenizer.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from segue.workers.errors import ModelRefused

RECORD = "segue.json"


class AdapterRecord(BaseModel):
    """A value of None is not known, and is not compared."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    mask: Literal["segment", "causal"] | None = None
    prompt_format: str | None = None
    segment_by: str | None = None  # has no effect under the causal mask, and is not compared there
    chat_template: str | None = None  # sha256 of its source and arguments, 16 hex digits
    base_model: str | None = None  # its name, without the folder that it was in; shown, not compared
    base_identity: str | None = None  # sha256 of its weights, configuration and tokenizer, 16 hex digits

    def differences(self, other: "AdapterRecord") -> list[str]:
        """What is different in `other`, the record of a job's own settings; one sentence part each."""
        names = ["mask", "prompt_format", "chat_template", "base_identity"]
        names += ["segment_by"] if self.mask == other.mask == "segment" else []
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [
            f"{name} {got} (trained with {trained})"
            for name, trained, got in pairs
            if trained is not None and got is not None and trained != got
        ]

    def save(self, directory: Path) -> None:
        text = json.dumps(self.model_dump(exclude_none=True), indent=2)
        (directory / RECORD).write_text(text + "\n", encoding="utf-8")


def load_record(adapter: Path) -> AdapterRecord | None:
    """None if the adapter has no record, since it was made elsewhere. Raises ModelRefused for an unreadable one."""
    path = adapter / RECORD
    if not path.is_file():
        return None
    try:
        return AdapterRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ModelRefused(f"{path}: {key or 'record'}: {first['msg']}, got {str(first['input'])[:80]!r}") from None


def template_digest(source: str, kwargs: Mapping[str, Any]) -> str:
    """Identifies a chat template together with its arguments."""
    return hashlib.sha256(json.dumps([source, kwargs], sort_keys=True).encode()).hexdigest()[:16]
