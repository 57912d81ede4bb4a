"""Options and arguments that commands of `segue` have in common, and what the short ones stand for."""

import json
import os
from typing import Annotated

import typer

JobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="the job file")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. sampling_params.max_tokens=64"),
]
Card = Annotated[str | None, typer.Option(help="also what memory and limits would be on this GPU, e.g. H100-80GB")]
Limit = Annotated[int | None, typer.Option(help="only the first rows of the input; short for --set input.limit=N")]
Sample = Annotated[
    str | None,
    typer.Option(metavar="N|PART", help="so many rows, or such a part, by the seed; short for --set input.sample=0.01"),
]
Output = Annotated[str | None, typer.Option(help="write here; short for --set output.path=FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="only the JSON line on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress on stderr")]


def require_auth(is_required: bool) -> None:
    if is_required:
        from segue.pipeline.processes.ray_session import REQUIRE_AUTH

        os.environ[REQUIRE_AUTH] = "1"


RequireAuth = Annotated[
    bool,
    typer.Option(
        "--require-auth",
        help="join no Ray cluster without a token; short for SEGUE_REQUIRE_AUTH=1",
        callback=require_auth,
    ),
]


def overrides_of(
    overrides: list[str] | None, limit: int | None, output: str | None, sample: str | None = None
) -> list[str]:
    """What the short options stand for. A path on the command line is relative to the current folder."""
    found = list(overrides or [])
    if limit is not None:
        found.append(f"input.limit={limit}")
    if sample is not None:
        found.append(f"input.sample={sample}")
    if output is not None:
        found.append(f"output.path={json.dumps(absolute(output))}")
    return found


def absolute(path: str) -> str:
    from pathlib import Path

    return path if "://" in path else str(Path(path).absolute())
