"""What a plan task must know, with values that no test of rendering depends on."""

from typing import Any

from pipeline.render import RenderSpec
from workers.prompts import PromptTemplate
from workers.sampling import SamplingParams

TEXT = PromptTemplate(format="text", text="{prompt}")


def render_spec(template: PromptTemplate = TEXT, **changes: Any) -> RenderSpec:
    """A spec for the echo model's tokenizer."""
    values: dict[str, Any] = {
        "source": "echo",
        "revision": None,
        "template": template,
        "date": "2026-01-02",
        "mask": "causal",
        "max_model_len": 1000,
        "window": None,
        "max_prompt_bytes": 10_000,
        "prompt_columns": ("prompt",),
        "passed_columns": (),
        "params": SamplingParams(),
    }
    return RenderSpec(**(values | changes))
