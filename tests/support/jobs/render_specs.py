"""What a plan task must know, with values that no test of rendering depends on."""

from typing import Any

from segue.pipeline.prompts.render import RenderSpec
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.params import SamplingParams

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"  # a template without end
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
        "max_prompt_bytes": 10_000,
        "prompt_columns": ("prompt",),
        "passed_columns": (),
        "params": SamplingParams(),
    }
    return RenderSpec(**(values | changes))
