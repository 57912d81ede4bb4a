"""The command that converts: other formats to a Parquet dataset, an output folder to other formats."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from segue.jobs.commands.ending import counted, exit_codes, print_json, say
from segue.jobs.commands.options import AsJson, absolute

if TYPE_CHECKING:
    from segue.pipeline.formats.convert import Converted
    from segue.pipeline.formats.export import Exported

ROWS_PER_FILE = 100_000

Types = Annotated[
    list[str] | None,
    typer.Option("--types", metavar="COLUMN=TYPE", help="of CSV or JSON, by Arrow's names, or json for its text"),
]


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="JSON Lines, CSV, TSV, hf:NAME, or an output folder")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="a new folder; of an output, FILE.jsonl or FILE.csv")],
    types: Types = None,
    infer: Annotated[
        bool, typer.Option("--infer", help="numbers and booleans of CSV; without it columns are text")
    ] = False,
    encoding: Annotated[str, typer.Option(help="of text files, such as latin-1")] = "utf-8",
    delimiter: Annotated[str | None, typer.Option(help="of CSV; default: , or in a .tsv file a tab")] = None,
    rows_per_file: Annotated[int, typer.Option(help="of a Parquet dataset", min=1)] = ROWS_PER_FILE,
    partial: Annotated[
        bool, typer.Option("--partial", help="of an output that is not finished, the rows it has")
    ] = False,
    json_only: AsJson = False,
) -> None:
    """JSON Lines, CSV or a Hugging Face dataset to Parquet for a job; or an output folder to JSON Lines or CSV.

    Texts stay texts, and nothing is guessed: a value that does not fit is named by file and line.
    """
    with exit_codes():
        from segue.pipeline.formats.export import SUFFIXES, check_target, from_output, is_output

        is_export = target.endswith(SUFFIXES) or (not source.startswith("hf:") and is_output(absolute(source)))
        _check_options(
            {"--types": types, "--infer": infer, "--encoding": encoding != "utf-8", "--delimiter": delimiter}
            if is_export
            else {"--partial": partial},
            is_export=is_export,
        )
        if is_export:
            check_target(target)
            exported = from_output(absolute(source), absolute(target), is_partial=partial)
            _say_exported(target, exported, json_only=json_only)
            print_json(asdict(exported))
            return
        from segue.pipeline.formats.column_types import parse_types
        from segue.pipeline.formats.convert import ReadOptions, to_parquet

        tab_or_other = "\t" if delimiter == "\\t" else delimiter
        options = ReadOptions(parse_types(types or ()), infer, encoding, tab_or_other)
        source = source if source.startswith("hf:") else absolute(source)
        converted = to_parquet(source, absolute(target), rows_per_file, options)
        _say_converted(target, converted, json_only=json_only)
        print_json(asdict(converted))


def _check_options(asked: dict[str, object], *, is_export: bool) -> None:
    """Refuse options that would be ignored."""
    from segue.pipeline.problems import JobRefused, Problem

    got = "an output folder as SOURCE" if is_export else "a SOURCE that is no output folder"
    wanted = "a SOURCE of text files" if is_export else "an output folder as SOURCE"
    problems = [Problem(name, got, wanted) for name, value in asked.items() if value]
    if problems:
        raise JobRefused(problems)


def _say_converted(target: str, found: "Converted", *, json_only: bool) -> None:
    for note in found.notes:
        say(f"note: {note}")
    if not json_only:
        columns = ", ".join(f"{name} ({kind})" for name, kind in zip(found.columns, found.types, strict=True))
        say(f"{target}: {counted(found.num_rows, 'row')} in {counted(found.num_files, 'file')}, columns {columns}")


def _say_exported(target: str, found: "Exported", *, json_only: bool) -> None:
    if not found.is_complete:
        say(f"warning: {target} is partial: it lacks {counted(found.num_missing, 'planned row')}")
    if found.num_changed:
        what = counted(found.num_changed, "value")
        say(f"warning: {what} without a form in this format: null, or with U+FFFD in a text")
    if not json_only:
        say(f"{target}: {counted(found.num_rows, 'row')}, columns {', '.join(found.columns)}")
