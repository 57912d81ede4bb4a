"""Which rows of a finished output have an error, for a job that answers these rows again.

Knows outputs and their manifests; nothing of models or Ray.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.ledger.reading import finished_manifest, read_columns


@dataclass(frozen=True)
class FailedRows:
    """The rows of one output that have an error."""

    output: str
    fingerprint: str  # of the job that wrote the output
    input_files: str  # identity of the files that the job read
    rows: Mapping[str, np.ndarray]  # src_path -> src_row of each failed row, int64, ascending

    @cached_property
    def identity(self) -> str:
        """sha256 of which rows they are, 16 hex digits."""
        digest = hashlib.sha256()
        for path, rows in sorted(self.rows.items()):
            digest.update(repr((path, len(rows))).encode() + rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def failed_rows(output: str) -> FailedRows:
    """Raises ForeignOutput if it is not a complete output of Segue, OutputStorageError."""
    manifest = finished_manifest(output)
    found: defaultdict[str, list[int]] = defaultdict(list)
    for table in read_columns(output, lambda schema: ["src_path", "src_row", "error"]):
        failed = table.filter(table["error"].is_valid())
        for path, row in zip(failed["src_path"].to_pylist(), failed["src_row"].to_pylist(), strict=True):
            found[path].append(row)
    rows = {path: np.sort(np.array(numbers, np.int64)) for path, numbers in found.items()}
    return FailedRows(output, manifest.fingerprint, manifest.fields["input.files"], rows)


def retry_job(output: str, into: str) -> dict[str, object]:
    """The job of a finished output as data, changed so that it answers the failed rows into another folder.

    Raises ForeignOutput.
    """
    manifest = finished_manifest(output)
    if not manifest.job:
        raise ForeignOutput(f"{output}: its manifest has no job; write a job file with input.retry_of: {output}")
    job = manifest.job
    return job | {"input": job["input"] | {"retry_of": output}, "output": job["output"] | {"path": into}}
