"""Whether an output is exact, told by plain pyarrow and fsspec: imports nothing of Segue.

Exact: every row of the input is there once, with its own columns and the answer that the echo engine owes it; every
shard holds its unit's rows in their order and is the one that `_SUCCESS` lists; nothing else lies about.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PASSED = "in:"
Origin = tuple[str, int]


class Inexact(AssertionError):
    """What is wrong with an output."""


def echo_answer(prompt: str, max_tokens: int) -> str:
    """What the echo engine makes of a plain-ASCII prompt under its own chat template."""
    return f"user\n{prompt}\nassistant\n"[-max_tokens:]


def check_exact(
    fs: Any,
    inputs: str,
    output: str,
    *,
    answer: Callable[[dict[str, Any]], Any] | None = None,
    errors: Mapping[Origin, str] | None = None,
) -> None:
    """Of a finished job. `answer(row)`: of an input row; rows named in `errors` have that code instead of one.

    Raises Inexact.
    """
    wanted = input_rows(fs, inputs)
    names = sorted(path.rpartition("/")[2] for path in fs.find(output, maxdepth=1))
    shards = [name for name in names if not name.startswith(("_", "."))]
    success = json.loads(fs.cat_file(f"{output}/_SUCCESS"))
    _same("shards in _SUCCESS", [shard["name"] for shard in success["shards"]], shards)
    _same("rows in _SUCCESS", success["rows"], len(wanted))
    found: dict[Origin, dict[str, Any]] = {}
    for shard in success["shards"]:
        content = fs.cat_file(f"{output}/{shard['name']}")
        _same(f"sha256 of {shard['name']}", hashlib.sha256(content).hexdigest(), shard["sha256"])
        rows = _rows(pq.read_table(io.BytesIO(content), page_checksum_verification=True))
        unit = pq.read_table(io.BytesIO(fs.cat_file(f"{output}/_job/units/{unit_of(shard['name'])}")))
        planned = list(zip(unit["src_path"].to_pylist(), unit["src_row"].to_pylist(), strict=True))
        _same(f"rows of {shard['name']} in their order", [_origin(row) for row in rows], planned)
        for row in rows:
            if _origin(row) in found:
                raise Inexact(f"{_origin(row)} is there twice")
            found[_origin(row)] = row
    _same("rows", sorted(found), sorted(wanted))
    for origin, row in found.items():
        given = wanted[origin]
        code = (row["error"] or {}).get("code")
        _same(f"error of {origin}", code, (errors or {}).get(origin))
        _same(f"columns of {origin}", repr({name: row[name] for name in given}), repr(given))
        if code is None and answer is not None:
            _same(f"answer of {origin}", row["generated_text"], answer(given))
    check_no_litter(fs, output)


def check_visible_are_whole(fs: Any, output: str) -> None:
    """Of a job at any moment: each shard there is can be read, and has the rows of its unit."""
    for path in fs.find(output, maxdepth=1) if fs.exists(output) else []:
        name = path.rpartition("/")[2]
        if not name.startswith(("_", ".")):
            rows = _rows(pq.read_table(io.BytesIO(fs.cat_file(path)), page_checksum_verification=True))
            unit = pq.read_table(io.BytesIO(fs.cat_file(f"{output}/_job/units/{unit_of(name)}")))
            _same(f"rows of {name}", [row["src_row"] for row in rows], unit["src_row"].to_pylist())


def check_no_litter(fs: Any, output: str) -> None:
    """Temporary files of a folder, pending uploads of a bucket."""
    _same("temporary files", [path for path in fs.find(output) if "/.tmp-" in path], [])
    if hasattr(fs, "call_s3"):
        bucket, _, prefix = output.partition("/")
        uploads = fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
        _same("pending uploads", [upload["Key"] for upload in uploads if upload["Key"].startswith(prefix)], [])


def input_rows(fs: Any, inputs: str) -> dict[Origin, dict[str, Any]]:
    """By file, relative to the folder, and place."""
    rows: dict[Origin, dict[str, Any]] = {}
    for path in sorted(fs.find(inputs)):
        name = path.rpartition(f"{inputs.rstrip('/').rpartition('/')[2]}/")[2]
        table = pq.read_table(io.BytesIO(fs.cat_file(path)))
        rows |= {(name, place): row for place, row in enumerate(_rows(table))}
    return rows


def unit_of(shard: str) -> str:
    return shard.replace("part-", "unit-", 1)


def _origin(row: Mapping[str, Any]) -> Origin:
    return row["src_path"], row["src_row"]


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    table.validate(full=True)
    return table.to_pylist()


def _same(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise Inexact(f"{what}: got {str(got)[:500]}, wanted {str(wanted)[:500]}")
