"""The `segue` command. stdout is for results, its last line JSON; stderr is for people.

Exit codes: 0 done, row errors within the limit included; 2 refused before start; 3 finished with units missing or over
the error limit; 4 workers cannot work; 5 storage; 130 and 143 interrupted, drained and resumable.
"""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from segue.jobs.commands.batch import batch
from segue.jobs.commands.convert import convert
from segue.jobs.commands.ending import exit_codes, print_json, say, silent
from segue.jobs.commands.options import (
    AsJson,
    Card,
    JobFile,
    Limit,
    Output,
    Overrides,
    Quiet,
    RequireAuth,
    Sample,
    absolute,
    overrides_of,
)
from segue.jobs.commands.outputs import errors, evaluate, report, status, verify
from segue.jobs.commands.running import run_file, run_values
from segue.jobs.commands.submit import cancel, logs, submit

SHOWN_ERRORS = 5

app = typer.Typer(
    name="segue", help="Batch inference over datasets, each shared prompt segment computed once.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip


@app.command()
def run(
    job: JobFile,
    overrides: Overrides = None,
    limit: Limit = None,
    sample: Sample = None,
    output: Output = None,
    show: Annotated[int, typer.Option(help="print this many answers")] = 0,
    json_only: AsJson = False,
    quiet: Quiet = False,
    require_auth: RequireAuth = False,
) -> None:
    """Plan the job if needed, run what is missing, and complete its output folder."""
    with exit_codes():
        ready, summary = run_file(job, overrides_of(overrides, limit, output, sample), quiet=quiet)
        if not json_only:
            from segue.jobs.show.folder import show_summary
            from segue.jobs.show.rows import show_answers

            show_answers(ready.config.output.path, show)
            show_summary(summary)
        print_json(asdict(summary))
    raise typer.Exit(summary.exit_code)


@app.command()
def retry(
    done: Annotated[str, typer.Argument(metavar="OUT", help="a finished output folder")],
    output: Annotated[str, typer.Option(help="where the new answers go")],
    overrides: Overrides = None,
    json_only: AsJson = False,
    quiet: Quiet = False,
    require_auth: RequireAuth = False,
) -> None:
    """Answer the rows that have an error in OUT, by the same job with what --set changes, into another folder."""
    with exit_codes():
        from segue.pipeline.ledger.failed_rows import retry_job

        job = retry_job(absolute(done), absolute(output))
        summary = run_values(job, overrides or [], quiet=quiet, json_only=json_only)
        print_json(asdict(summary))
    raise typer.Exit(summary.exit_code)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    limit: Limit = None,
    sample: Sample = None,
    output: Output = None,
    card: Card = None,
    json_only: AsJson = False,
    quiet: Quiet = False,
    require_auth: RequireAuth = False,
) -> None:
    """Render, tokenise and order all prompts; show the tree they share; stop before any model runs."""
    with exit_codes():
        from segue.jobs.analysis.capacity import capacity, card_of
        from segue.jobs.show.plan import show_memory, show_plan
        from segue.pipeline.ready.child import checking_child
        from segue.pipeline.ready.job import ready_job
        from segue.pipeline.run.run import plan_job

        wanted = card_of(card)
        with checking_child() as child:
            ready = ready_job(job, overrides_of(overrides, limit, output, sample), child=child)
            manifest = plan_job(ready, silent if quiet else say, child)
        if not json_only:
            show_plan(manifest, ready)
        memory = capacity(ready, manifest, wanted) if wanted else None
        if memory is not None and not json_only:
            show_memory(memory)
        print_json(
            {
                "output": ready.config.output.path,
                "rows": manifest.num_rows,
                "units": len(manifest.units),
                **manifest.stats,
                **({"memory_plan": asdict(memory)} if memory else {}),
            }
        )


@app.command()
def validate(
    job: JobFile,
    overrides: Overrides = None,
    limit: Limit = None,
    sample: Sample = None,
    output: Output = None,
) -> None:
    """Check job file, data, output folder, model and cluster, and render a few rows, without starting anything; every
    problem at once.

    Of a job for `segue run`, or for `segue finetune`.
    """
    with exit_codes():
        from segue.pipeline.jobfile.read import is_training
        from segue.pipeline.ledger.completeness import check_unused
        from segue.pipeline.processes.address import check_reachable, is_local
        from segue.pipeline.ready.job import existing_manifest, ready_job

        changes = overrides_of(overrides, limit, output, sample)
        others = check_reachable()
        if is_training(job):
            from segue.pipeline.train.finetune import prepare_finetune

            ready = prepare_finetune(job, changes, others).job
        else:
            ready = ready_job(job, changes, others=others, runs_here=is_local())
        manifest = existing_manifest(ready)
        if manifest is None:
            check_unused(ready.store)
        rows = ready.checked.num_rows
        num_files = len(ready.checked.inputs)
        say(f"{job}: valid ({rows:,} rows in {num_files} files, mask {ready.mask}, dtype {ready.facts.dtype})")
        trial = ready.trial
        if trial.errors:
            say(f"warning: {len(trial.errors)} of {trial.num_rows} rows that were tried have an error:")
            for error in trial.errors[:SHOWN_ERRORS]:
                say(f"  {error}")
        print_json(
            {
                "valid": True,
                "rows": rows,
                "mask": ready.mask,
                "dtype": ready.facts.dtype,
                "planned": manifest is not None and manifest.is_complete,
                "sample": {"rows": trial.num_rows, "errors": len(trial.errors)},
            }
        )


@app.command()
def attention(
    job: JobFile,
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(help="which row of the input, from 0")] = 0,
    layer: Annotated[int | None, typer.Option(help="only this layer, from 0; else the mean of all")] = None,
    picture: Annotated[str, typer.Option(help="the PNG to write")] = "attention.png",
) -> None:
    """A picture of who looks at whom in one row's prompt, under the causal and the segment mask."""
    with exit_codes():
        from segue.jobs.show.attention_picture import draw_attention
        from segue.jobs.show.pictures import check_can_draw
        from segue.pipeline.ready.job import ready_job

        check_can_draw(picture)
        found = draw_attention(ready_job(job, overrides_of(overrides, None, None)), row, layer, picture)
        print_json(found)


@app.command()
def schema(
    training: Annotated[bool, typer.Option("--finetune", help="of a job file for segue finetune")] = False,
) -> None:
    """The job file's JSON schema, for editors."""
    from segue.pipeline.jobfile.json_schema import job_schema
    from segue.pipeline.jobfile.schema import JobConfig
    from segue.pipeline.jobfile.training import FinetuneConfig

    print(json.dumps(job_schema(FinetuneConfig if training else JobConfig), indent=2))


@app.command()
def finetune(
    job: Annotated[str, typer.Argument(metavar="FT.yaml", help="the fine-tuning job file")],
    overrides: Overrides = None,
    limit: Limit = None,
    sample: Sample = None,
    output: Output = None,
    json_only: AsJson = False,
    quiet: Quiet = False,
    require_auth: RequireAuth = False,
) -> None:
    """Train an adapter for the segment mask (or the causal one), going on where a run before has stopped."""
    with exit_codes():
        from segue.jobs.show.loss_curve import draw_loss_curve
        from segue.jobs.show.pictures import check_can_draw
        from segue.jobs.show.training import TrainingDisplay, show_training
        from segue.pipeline.ready.child import checking_child
        from segue.pipeline.train.finetune import prepare_finetune, run_finetune

        check_can_draw()
        with checking_child() as child:
            ready = prepare_finetune(job, overrides_of(overrides, limit, output, sample), child=child)
            summary = run_finetune(ready, silent if quiet else say, TrainingDisplay(quiet=quiet), child)
        picture = draw_loss_curve(summary.output)
        if not json_only:
            show_training(summary, picture)
        print_json(asdict(summary) | {"loss_curve": picture})
    raise typer.Exit(summary.exit_code)


for command in (errors, status, report, verify, evaluate, batch, convert, submit, logs, cancel):
    app.command()(command)


def main() -> None:
    """The entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
