"""The command that converts: other formats to a Parquet dataset, an output folder to other formats."""

from dataclasses import asdict
from typing import Annotated

import typer

from segue.jobs.commands.ending import exit_codes, print_json, say
from segue.jobs.commands.options import AsJson, absolute

ROWS_PER_FILE = 100_000


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="JSON lines, CSV, TSV, hf:NAME, or an output folder")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="a new folder; of an output, FILE.jsonl or FILE.csv")],
    rows_per_file: Annotated[int, typer.Option(help="of a Parquet dataset", min=1)] = ROWS_PER_FILE,
    json_only: AsJson = False,
) -> None:
    """JSON lines, CSV or a Hugging Face dataset to Parquet for a job; or an output folder to JSON lines or CSV."""
    with exit_codes():
        from segue.pipeline.formats.convert import HUB, from_output, to_parquet

        source = source if source.startswith(HUB) else absolute(source)
        if target.endswith((".jsonl", ".csv")):
            found = from_output(source, absolute(target))
        else:
            found = to_parquet(source, absolute(target), rows_per_file)
        if not json_only:
            say(f"{target}: {found.num_rows:,} rows in {found.num_files:,} files, columns {', '.join(found.columns)}")
        print_json(asdict(found))
