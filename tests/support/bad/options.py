"""Cases C34 and C36 of the bad-input matrix: each key of the job file with values that it may not have, and filters
that make no sense. A refusal names the key."""

import re
from typing import Any

from bad.cases import Cases

OPTIONS = Cases()
HUGE = 2**70
WRONG: dict[str, list[Any]] = {
    "task": ["answer", 1, None],
    "mask": ["bidirectional", True],
    "seed": [-1, 1.5, "1", HUGE, None],
    "model": ["echo", [], None],
    "model.dtype": ["int4", 32],
    "model.quantization": ["int8"],
    "model.check_adapter": ["yes", 1],
    "model.revision": [7],
    "input": ["in", None],
    "input.path": [[], 3, "", "a\nb", ["in", 4], {"a": 1}],
    "input.limit": [-1, 1.0, True],
    "input.sample": [0, -0.5, 1.5, "half", HUGE + 0.5],
    "input.columns": ["prompt", {"promt": "x"}],
    "prompt": ["{prompt}", 4],
    "prompt.format": ["jinja", None],
    "plan": [[], 1],
    "plan.window_rows": [0, -1, 2.5, "all"],
    "output": ["out"],
    "output.path": ["", 1, "ftp://host/x", "s3://AKIAEXAMPLE:SECRETKEY@bucket/x"],
    "output.columns": ["some", ["id", "id"], [1], {"id": True}],
    "output.max_rows_per_file": [0, "8192"],
    "output.max_bytes_per_file": [0, -5],
    "workers.min_size": [0, "two"],
    "workers.num_gpus": [-1, "all"],
    "workers.accelerator_type": ["", 100],
    "workers.tensor_parallel_size": [0, 1.5],
    "workers.units_in_flight": [0],
    "workers.max_num_batched_tokens": [0, "2048"],
    "workers.kv_cache_memory_bytes": [0, "4GiB"],
    "workers.enable_prefix_caching": ["no", 0],
    "workers.threads": [0, 0.5],
    "workers.step_timeout_s": [0, -1, "10m"],
    "limits.max_error_rate": [-0.1, 1.1, "5%"],
    "limits.max_prompt_bytes": [0, "4MB"],
    "limits.row_cpu_s": [0.5, 10**6],
    "sampling_params": ["greedy", [0.7]],
    "sampling_params.n": [1.5, "2"],
    "sampling_params.top_k": [-2, 1.5],
    "sampling_params.min_p": [-0.1, 2],
    "sampling_params.seed": ["x"],
    "sampling_params.stop": [5, [1]],
}
GOOD_SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"source": "echo"}, "input": {"path": "in"}, "output": {"path": "out"},
}  # fmt: skip

for key, values in WRONG.items():
    section, _, name = key.partition(".")
    sections = [{section: GOOD_SECTIONS.get(section, {}) | {name: value} if name else value} for value in values]
    OPTIONS.cases("C34", f"{key} of another kind", rf"(?m)^(?!.*SECRETKEY).*{re.escape(key)}", sections)

FILTERS: dict[str, list[Any]] = {
    "that are no list": ["id > 1", {"id": 1}, 5],
    "without three parts": [[["id", ">"]], [["id"]], [["id", ">", 1, 2]], [[]]],
    "of a column that is not there": [[["ids", "==", 1]], [["", "==", 1]]],
    "with another sign": [[["id", "~", 1]], [["id", "=>", 1]]],
    "of another type than the column": [
        [["id", "==", "1"]], [["prompt", ">", 1]], [["id", "in", ["a"]]], [["id", "==", True]],
    ],
    "that compare with what is no value": [
        [["id", "in", 5]], [["id", "==", [1]]], [["id", "==", {"a": 1}]], [["id", "<", None]],
    ],
}  # fmt: skip
for what, values in FILTERS.items():
    OPTIONS.cases(
        "C36", f"filters {what}", r"input\.filters", [{"input": {"path": "in", "filters": v}} for v in values]
    )
