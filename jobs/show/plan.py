"""What `segue plan` prints for people: what the prompts share, what that saves, and what fits on a card."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from segue.jobs.show.lines import console, plain
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ready.job import ReadyJob
from segue.workers.devices.card import GB, MemoryPlan


def show_plan(manifest: Manifest, job: ReadyJob) -> None:
    """Print the tree: which segments are shared, by how many rows, and how many tokens that saves."""
    out, stats = console(), manifest.stats
    requested, distinct = stats["tokens_requested"], stats["tokens_distinct"]
    saved = 1 - distinct / requested if requested else 0.0
    num_workers = job.config.workers.max_size
    num_requests = f" ({stats['num_requests']:,} requests)" if job.config.task != "generate" else ""
    out.print(
        f"{manifest.num_rows:,} rows{num_requests} in {len(manifest.units)} units, "
        f"mask {job.mask}, dtype {job.facts.dtype}"
    )
    if manifest.num_errors:
        codes = ", ".join(f"{count:,} {code}" for code, count in manifest.errors.items())
        out.print(f"rows with an error: {manifest.num_errors:,} ({codes}); segue errors shows them")
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
    """Print what memory and speed the job would have on one card."""
    out = console()
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
