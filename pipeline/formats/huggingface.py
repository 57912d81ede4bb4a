"""Datasets of Hugging Face's library, saved in a folder or on the hub. Their columns have types already."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from segue.pipeline.problems import JobRefused, Problem, first_and_last_line, shown

HUB = "hf:"  # begins the name of a dataset on Hugging Face's hub: hf:NAME, hf:NAME:SPLIT
SAVED_DATASET = ("dataset_info.json", "state.json", "dataset_dict.json")  # files that datasets.save_to_disk writes
BATCH_ROWS = 1000


def is_huggingface(source: str) -> bool:
    """Whether a source is one of these datasets."""
    return source.startswith(HUB) or any((Path(source) / name).is_file() for name in SAVED_DATASET)


class HuggingFaceDataset:
    """A dataset of one split. Raises JobRefused if it cannot be loaded, or has several."""

    def __init__(self, source: str) -> None:
        loaded = _loaded(source)
        if isinstance(loaded, dict):
            wanted = f"a folder of one of its splits: {', '.join(f'{source}/{name}' for name in loaded)}"
            raise JobRefused([Problem("SOURCE", f"{shown(source)}, which has several", wanted)])
        self._dataset = loaded.with_format("arrow")
        self.schema: pa.Schema = loaded.features.arrow_schema

    def tables(self) -> Iterator[pa.Table]:
        for table in self._dataset.iter(batch_size=BATCH_ROWS):
            yield table.cast(self.schema)


def _has_no_files(source: str) -> bool:
    """Whether a saved dataset has no rows: `load_from_disk` of datasets 5.2 raises IndexError then."""
    state = Path(source) / "state.json"
    return state.is_file() and json.loads(state.read_text(encoding="utf-8")).get("_data_files") == []


def _without_rows(source: str) -> Any:
    import datasets

    features = datasets.DatasetInfo.from_directory(source).features or datasets.Features()
    return datasets.Dataset.from_dict({name: [] for name in features}, features=features)


def _loaded(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        wanted = "datasets installed: pip install 'segue[datasets]'"
        raise JobRefused([Problem("SOURCE", shown(source), wanted)]) from None
    try:
        if not source.startswith(HUB):
            return _without_rows(source) if _has_no_files(source) else datasets.load_from_disk(source)
        name, _, split = source.removeprefix(HUB).partition(":")
        return datasets.load_dataset(name, split=split or "train", streaming=False)
    except Exception as error:  # the library, its readers and the network have errors of many kinds
        got = f"{shown(source)} ({type(error).__name__}: {first_and_last_line(str(error))})"
        raise JobRefused([Problem("SOURCE", got, "a dataset that Hugging Face's library can load")]) from None
