"""The file in which a training says what it has done, read back: one JSON line for each step and each evaluation.

Knows the file's name and its lines; `pipeline/train/metrics.py` writes them.
"""

import json
from typing import Any

from segue.pipeline.storage.store import Store

METRICS = "metrics.jsonl"


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """The whole lines in a training's folder, none before its first step. A killed process may leave half a line.

    Raises OutputStorageError.
    """
    try:
        *lines, _ = store.read(METRICS).split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]
