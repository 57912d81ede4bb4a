"""Small changes that make the product wrong, each with the tests that have to notice it.

A mutant is a text that is replaced in one file. Knows the product's text alone; `mutations.py` makes and runs them.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a file. `tests`: files or tests of `make test`, of which one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def applied(self, text: str) -> str:
        """The file's text, changed. Raises ValueError unless `old` is there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} has {count} places with {self.old!r}, wanted 1")
        return text.replace(self.old, self.new)

    def apply(self, root: Path) -> None:
        """In the copy of the repository at `root`."""
        path = root / self.file
        path.write_text(self.applied(path.read_text(encoding="utf-8")), encoding="utf-8")


STORE_TESTS = "tests/pipeline/storage/test_store.py tests/faults/test_crash_points.py"
FINGERPRINT_TESTS = "tests/pipeline/ready/test_fingerprint.py"
ERROR_LIMIT_TESTS = "tests/pipeline/run/test_error_limit.py"
CUTTING_TESTS = "tests/pipeline/plan/test_cuts.py"

COMMIT_PROTOCOL = (
    Mutant(
        "rename for link", "pipeline/storage/folder.py",
        "os.link(temporary, target)", "os.replace(temporary, target)", STORE_TESTS,
    ),
    Mutant(
        "no If-None-Match", "pipeline/storage/bucket.py",
        'content, mode="create", ', "content, ", "tests/pipeline/storage/test_object_store.py",
    ),
    Mutant(
        "names of shards with a uuid", "pipeline/ledger/units.py",
        'f"part-{self.ordinal:06d}-{self.unit_id}.parquet"',
        'f"part-{self.ordinal:06d}-{__import__(\'uuid\').uuid4().hex[:16]}.parquet"',
        "tests/pipeline/ledger/test_units_shards.py tests/faults/test_crash_points.py",
    ),
    Mutant(
        "rows with an error are dropped", "pipeline/ledger/columns.py",
        "    columns = [\n        passed[field.name]",
        "    rows = [row for row in rows if not row.get('error')]\n    columns = [\n        passed[field.name]",
        "tests/pipeline/ledger/test_units_shards.py tests/pipeline/run/test_row_errors.py",
    ),
    Mutant(
        "what is there is not read back after a 412", "pipeline/storage/bucket.py",
        "return self._is_ours(name, content)", "return False", "tests/pipeline/storage/test_object_store.py",
    ),
    Mutant(
        "files are not synced", "pipeline/storage/folder.py",
        "        os.fsync(file.fileno())\n", "", "tests/faults/test_crash_points.py",
    ),
    Mutant(
        "folders are not synced", "pipeline/storage/folder.py",
        "        os.fsync(descriptor)\n", "        pass\n", "tests/faults/test_crash_points.py",
    ),
)  # fmt: skip

# Those that survived when the suite was reviewed on 2026-11-30.
SURVIVED_ONCE = (
    Mutant(
        "each window is planned with its own day's date", "pipeline/plan/windows.py",
        "before.date if before else today()", "today()", "tests/pipeline/plan/test_frozen_date.py",
    ),
    Mutant(
        "sampling_params do not belong to the job", "pipeline/ready/fingerprint.py",
        'return {"sampling_params": config.sampling_params.model_dump(mode="json")}', "return {}", FINGERPRINT_TESTS,
    ),
    Mutant(
        "input.limit does not belong to the job", "pipeline/ready/fingerprint.py",
        '        "input.limit": config.input.limit,\n', "", FINGERPRINT_TESTS,
    ),
    Mutant(
        "input.filters do not belong to the job", "pipeline/ready/fingerprint.py",
        'include={"filters", "sample"}', 'include={"sample"}', FINGERPRINT_TESTS,
    ),
    Mutant(
        "input.sample does not belong to the job", "pipeline/ready/fingerprint.py",
        'include={"filters", "sample"}', 'include={"filters"}', FINGERPRINT_TESTS,
    ),
    Mutant(
        "a resumed run forgets the errors that are committed", "pipeline/run/run.py",
        "before.rows, found_by_workers)", "before.rows, 0)", ERROR_LIMIT_TESTS,
    ),
    Mutant(
        "a receipt over the error limit does not stop the workers", "pipeline/run/passes.py",
        "if failure is not None or self._tally.reason:", "if failure is not None:", ERROR_LIMIT_TESTS,
    ),
    Mutant(
        "max_bytes_per_file is ignored", "pipeline/plan/cutting.py",
        " or self._num_bytes + row_bytes > self._max_bytes", "", CUTTING_TESTS,
    ),
)  # fmt: skip

ACROSS_THE_PACKAGES = (
    Mutant(
        "a token sees the one behind it", "attention/visibility.py",
        "positions[None, :] <= positions[:, None]", "positions[None, :] <= positions[:, None] + 1",
        "tests/attention/test_tree_attention.py",
    ),
    Mutant(
        "equal tokens of two kinds have one key", "attention/tree/node.py",
        "parent_key + kind + tokens", "parent_key + tokens", "tests/attention/test_segment_tree.py",
    ),
    Mutant(
        "a causal run is not cut where prompts part", "attention/tree/tree.py",
        "if common < len(child):", "if common < len(child) - 1:", "tests/attention/test_segment_tree.py",
    ),
    Mutant(
        "all samples of a row are drawn alike", "workers/sampling/draw.py",
        'f"{seed}:{sample_index}:{position}:"', 'f"{seed}:{position}:"', "tests/workers/engine/test_drawing.py",
    ),
    Mutant(
        "later windows of a text lose a token of context", "workers/scoring/windows.py",
        "start = max(0, stop - max_length - 1)", "start = max(0, stop - max_length)",
        "tests/workers/engine/test_score.py",
    ),
    Mutant(
        "an answer at its length goes on", "workers/sampling/ending.py",
        "len(sample.token_ids) >= sample.request.params.max_tokens",
        "len(sample.token_ids) > sample.request.params.max_tokens", "tests/workers/engine/test_engine.py",
    ),
    Mutant(
        "every seed takes the same sample", "pipeline/dataset/selection.py",
        "seed * 0xD1B54A32D192ED03", "0 * 0xD1B54A32D192ED03", "tests/pipeline/dataset/test_selection.py",
    ),
    Mutant(
        "`not in` takes what `in` takes", "pipeline/dataset/selection.py",
        'is_in if sign == "in" else ~is_in', "is_in", "tests/pipeline/dataset/test_selection.py",
    ),
    Mutant(
        "a half that is to blame is not searched", "pipeline/run/quarantine.py",
        'outcome != "survived" and not self._search(', 'outcome not in ("survived", "blamed") and not self._search(',
        "tests/pipeline/run/test_quarantine.py",
    ),
    Mutant(
        "a unit's last row is left out", "pipeline/run/worker.py",
        "rows = list(planned_rows(table, self._spec.params))\n        for place",
        "rows = list(planned_rows(table, self._spec.params))[:-1]\n        for place",
        "tests/pipeline/run/test_output.py",
    ),
    Mutant(
        "McNemar's test is one-sided", "jobs/analysis/statistics.py",
        "2 * tail / 2**total", "tail / 2**total", "tests/jobs/test_evaluate.py",
    ),
    Mutant(
        "a window has one token more", "attention/cpu/layer_tables.py",
        "position - self._window + 1 - key", "position - self._window - key", "tests/attention/test_layer_attention.py",
    ),
    Mutant(
        "a clipped square on GPUs begins one key late", "attention/cuda/clipped.py",
        "keys.place + first_seen, num_rest", "keys.place + first_seen + 1, num_rest",
        "tests/attention/test_layer_attention.py",
    ),
    Mutant(
        "all rows of a longrope model are short", "workers/models/tree_model.py",
        "num_tokens > self.long_rope.most_short", "False", "tests/workers/models/test_rope.py",
    ),
    Mutant(
        "totals of logits are summed in fp32", "attention/cpu/cpp/small.cpp",
        "constexpr int64_t kSummedAtOnce = 16 * kLanes;", "constexpr int64_t kSummedAtOnce = int64_t{1} << 40;",
        "tests/attention/test_kernels.py",
    ),
    Mutant(
        "perplexity of words is that of tokens", "jobs/analysis/evaluate.py",
        '-logprob / _total(rows["num_words"])', '-logprob / _total(rows["num_tokens"])', "tests/jobs/test_evaluate.py",
    ),
)  # fmt: skip

MUTANTS = (*COMMIT_PROTOCOL, *SURVIVED_ONCE, *ACROSS_THE_PACKAGES)
