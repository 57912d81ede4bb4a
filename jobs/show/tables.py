"""What commands print for people: the plan's tree, a sample of answers, the summary, the errors.

Text of rows is shown escaped: it may hold control sequences of a terminal.
"""

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.reading import sample_rows, task_of
from segue.pipeline.ledger.status import JobStatus
from segue.pipeline.ledger.totals import RunSummary
from segue.pipeline.ledger.verify import Verification
from segue.pipeline.ready.job import ReadyJob
from segue.workers.devices.card import GB, MemoryPlan
from segue.workers.scoring.template import Task

MAX_CELL_CHARS = 160
SAMPLE_SEED = 0


def show_plan(manifest: Manifest, job: ReadyJob) -> None:
    """The tree: what is shared, by how many rows, and what that saves."""
    out, stats = _console(), manifest.stats
    requested, distinct = stats["tokens_requested"], stats["tokens_distinct"]
    saved = 1 - distinct / requested if requested else 0.0
    num_workers = job.config.workers.max_size
    num_requests = f" ({stats['num_requests']:,} requests)" if job.config.task != "generate" else ""
    out.print(
        f"{manifest.num_rows:,} rows{num_requests} in {len(manifest.units)} units, "
        f"mask {job.mask}, dtype {job.facts.dtype}"
    )
    out.print(f"prompt tokens: {requested:,} requested, {distinct:,} distinct: {saved:.1%} need not be computed")
    if num_workers > 1:
        bound = distinct + stats["extra_tokens_bound"]
        out.print(f"with {num_workers} workers at most {bound:,}: each may compute a shared root once")
    if manifest.num_windows > 1:
        out.print(f"planned in {manifest.num_windows} windows, of which each counts for itself")
    _print_shared(out, stats["top_shared"], "rows" if job.config.task == "generate" else "requests")
    _print_undeclared(out, stats["undeclared"])
    longest = ", ".join(f"{tokens:,} ({row})" for tokens, row in stats["longest"][:3])
    out.print(f"longest prompts, in tokens: {longest or 'none'}; limit {job.max_model_len:,}")


def show_memory(plan: MemoryPlan) -> None:
    """A card's memory and limits."""
    out = _console()
    out.print(
        f"on one {plan.card}: {plan.weight_bytes / GB:,.1f} GB of weights, {plan.kv_bytes / GB:,.1f} GB or "
        f"{plan.kv_tokens:,} tokens of keys and values, {plan.rows_in_flight:,} rows in flight"
    )
    out.print(
        f"its limits: {plan.prefill_tokens_per_second:,.0f} prompt tokens/s, a decode step in "
        f"{1e3 * plan.decode_step_seconds:.2f} ms or {plan.decode_tokens_per_second:,.0f} tokens/s; "
        f"at these the whole plan takes {plan.seconds:,.0f} s"
    )


def _print_shared(out: Console, nodes: Sequence[dict[str, Any]], what: str) -> None:
    table = Table(title="most saving shared segments", title_justify="left", box=None, pad_edge=False)
    for name in ("tokens", "at", what, "saved", "kind", "first row"):
        table.add_column(name, justify="left" if name in ("kind", "first row") else "right")
    for node in nodes[:10]:
        kind = "segment" if node["bidirectional"] else "causal"
        cells = (node["num_tokens"], node["start"], node["num_rows"], node["tokens_saved"])
        table.add_row(*(f"{cell:,}" for cell in cells), kind, plain(node["first_row"]))
    if nodes:
        out.print(table)


def _print_undeclared(out: Console, prefixes: Sequence[dict[str, Any]]) -> None:
    for prefix in prefixes[:3]:
        out.print(
            f"{prefix['num_segments']:,} different messages begin with the same {prefix['num_tokens']:,} tokens "
            f"(first in {plain(prefix['first_row'])}): a bidirectional segment is shared as a whole only; "
            "give that text a message or, with prompt.segment_by: part, a part of its own"
        )


def show_answers(output: str, count: int) -> None:
    """A fixed sample of rows with their answers."""
    if count <= 0:
        return
    out, task = _console(), task_of(output)
    for row in sample_rows(output, count, SAMPLE_SEED):
        out.print(f"[bold]{plain(row['src_path'])}:{row['src_row']}[/bold]")
        for name, value in row.items():
            if name not in RESULT_COLUMNS[task] and isinstance(value, str):
                out.print(f"  {plain(name)}: {plain(value)}")
        out.print(f"  -> {plain(_answer(row, task))}\n")


def _answer(row: dict[str, Any], task: Task) -> str:
    """A row's result in a line."""
    if row["error"] is not None:
        return f"{row['error']['code']}: {row['error']['message']}"
    if task == "generate":
        return row["generated_text"]
    if task == "choose":
        verdict = {True: ", right", False: ", wrong", None: ""}[row["correct"]]
        logprobs = ", ".join(f"{logprob:.2f}" for logprob in row["choice_logprobs"])
        return f"choice {row['choice']}{verdict} (log-probabilities {logprobs})"
    return f"log-probability {row['logprob']:.2f} over {row['num_tokens']:,} tokens"


def show_summary(summary: RunSummary) -> None:
    """The run in a few lines."""
    out = _console()
    errors = ", ".join(f"{count} {code}" for code, count in summary.errors.items()) or "none"
    out.print(
        f"{summary.status.replace('_', ' ')}: {summary.rows:,} rows in {summary.shards} shards "
        f"in {plain(summary.output)}"
    )
    out.print(f"row errors: {errors}")
    out.print(
        f"prompt tokens: {summary.tokens_requested:,} requested, {summary.tokens_distinct:,} distinct, "
        f"{summary.tokens_computed:,} computed ({summary.share_reused:.1%} reused); "
        f"{summary.tokens_generated:,} generated"
    )
    if summary.rows_this_run:
        out.print(
            f"this run: {summary.rows_this_run:,} rows in {summary.seconds:.1f} s, {summary.rows_per_second:.1f} rows/s"
        )
    if told := _next_of(summary):
        out.print(f"next: {told}")


def _next_of(summary: RunSummary) -> str:
    """What to type now, where there is something to do."""
    output = plain(shlex.quote(summary.output))
    steps = []
    if summary.num_errors:
        steps.append(f"segue errors {output}")
    if summary.status not in ("done", "already_complete"):
        steps.append("the same command goes on where this one stopped")
    elif summary.num_errors:
        steps.append(f"segue retry {output} --output OTHER --set KEY=VALUE answers these rows again")
    return "; ".join(steps)


def show_status(found: JobStatus) -> None:
    """How far, who is at it, and what to type next."""
    out = _console()
    if found.status == "planning":
        out.print(f"planning: nothing is in {plain(found.output)} yet")
    else:
        _show_progress(out, found)
    for run in found.runs:
        out.print(f"at work: process {plain(str(run['pid']))} on {plain(str(run['host']))}")
    if found.status == "stopped":
        command = "finetune" if found.training is not None else "run"
        out.print(f"nobody is at work on it: the same `segue {command} JOB.yaml` goes on where it stopped")


def _show_progress(out: Console, found: JobStatus) -> None:
    out.print(f"{plain(found.name)}: {found.status}, {found.share_done:.1%}, in {plain(found.output)}")
    if found.training is not None:
        told = ", ".join(f"{name} {value}" for name, value in found.training.items())
        out.print(f"training: {plain(told) or 'no step yet'}")
    else:
        more = "" if found.is_planned else "; more of the input is still to be planned"
        out.print(f"{found.rows_done:,} of {found.rows:,} rows in {found.units_done:,} of {found.units:,} shards{more}")
        out.print(f"row errors: {', '.join(f'{n} {code}' for code, n in found.errors.items()) or 'none'}")
        out.print(f"tokens: {found.tokens_computed:,} computed, {found.tokens_generated:,} generated")


def show_errors(rows: Sequence[dict[str, Any]], total: int) -> None:
    """One line a row."""
    out = _console()
    for row in rows:
        out.print(f"{plain(row['src_path'])}:{row['src_row']} {row['code']}: {plain(row['message'])}")
    if total > len(rows):
        out.print(f"... and {total - len(rows):,} more")
    if not total:
        out.print("no row has an error")


def plain(text: str) -> str:
    """One line without control characters or markup."""
    line = "".join(char if char.isprintable() else " " for char in text).strip()
    return escape(line if len(line) <= MAX_CELL_CHARS else f"{line[: MAX_CELL_CHARS - 3]}...")


def show_verification(found: Verification) -> None:
    """Each damaged file, and what is in order."""
    out = _console()
    for damage in found.damages:
        out.print(f"{damage.kind}: {plain(damage.path)}: {plain(damage.detail)}", soft_wrap=True)
    missing = f", {found.missing} still to come" if found.missing else ""
    out.print(f"{found.status}: {found.rows:,} rows in {found.shards} shards in order{missing}")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
