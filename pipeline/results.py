"""The columns a job adds to the rows it was given.

Knows names only; input columns passed through must not have any of them.
"""

RESULT_COLUMNS: tuple[str, ...] = (
    "src_path",
    "src_row",
    "generated_text",
    "finish_reason",
    "num_input_tokens",
    "num_cached_tokens",
    "num_generated_tokens",
    "logprobs",
    "samples",
    "error",
)
