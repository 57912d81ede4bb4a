"""The `segue` command in this process, and a finished output folder to use it on."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from typer.testing import CliRunner

from segue.jobs.cli import app
from segue.pipeline.ledger.columns import result_schema, result_table
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.shards import PROTOCOL, ShardFooter, commit_shard, serialize_shard
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.storage.folder import LocalStore
from segue.workers.rows.params import SamplingParams


def segue(*arguments: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def last_line(out: str) -> dict[str, Any]:
    """The JSON that a command's stdout ends with."""
    return json.loads(out.splitlines()[-1])


def finished_output(folder: Path, texts: list[bytes | None], errors: list[dict[str, str] | None]) -> Path:
    """An output folder of one shard, without a run. A text of None is a row with an error."""
    store, unit = LocalStore(folder / "out"), UnitSpec(0, "0" * 16, len(texts), len(texts), 1)
    manifest = Manifest(PROTOCOL, "job", "2026-01-02", {}, {}, (unit,), {})
    store.create("_job/manifest.json", manifest.to_bytes())
    passed = pa.table({"note": pa.array(texts, pa.binary()).view(pa.string())})
    results = [
        {"src_path": "a", "src_row": n, "generated_text": None if error else f"answer {n}", "error": error}
        for n, error in enumerate(errors)
    ]
    shard = result_table(result_schema(passed.schema, SamplingParams()), passed, results)
    footer = ShardFooter(PROTOCOL, manifest.fingerprint, unit.unit_id, len(texts), {}, 0, 0, 0)
    commit_shard(store, unit, serialize_shard(shard, footer), manifest.fingerprint)
    return folder / "out"
