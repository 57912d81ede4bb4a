"""What an adapter was trained for: `segue.json` beside its weights says the mask and how prompts are put together.

An adapter answers well under what it was trained under, and nobody sees from its weights what that was. Knows files;
no weights, no tokenizer.
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
    """Frozen; what is None was not said, and is not compared."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    mask: Literal["segment", "causal"] | None = None
    prompt_format: str | None = None
    segment_by: str | None = None  # under the causal mask without effect, and not compared
    chat_template: str | None = None  # sha256 of its source and arguments, 16 hex digits
    base_model: str | None = None  # its name, without the folder it was in; told, not compared
    base_identity: str | None = None  # sha256 of its weights, configuration and tokenizer, 16 hex digits

    def differences(self, other: "AdapterRecord") -> list[str]:
        """What `other`, the record that a job's own settings would give, has otherwise."""
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
    """None if the adapter has none: then it was made elsewhere. Raises ModelRefused for one that is not understood."""
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
    """Names a chat template and what it is rendered with."""
    return hashlib.sha256(json.dumps([source, kwargs], sort_keys=True).encode()).hexdigest()[:16]
