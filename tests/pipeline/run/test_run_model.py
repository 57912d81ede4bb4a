"""Jobs with a tiny real model: the plan's token counts are what the engines compute, to the token."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml_job
from in_process import run, run_here

from segue.pipeline.ledger.manifest import load_manifest
from segue.pipeline.storage.open import open_store

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")

LEVELS = [
    {
        "system": f"You are helper {a}. " * 3,
        "rubric": f"Rubric {b}: be brief. ",
        "text": f"Text {c}.",
        "ask": f"q{d}?",
    }
    for a in range(2)
    for b in range(2)
    for c in range(3)
    for d in range(4)
]


def write_job(tmp_path, model, rows, **changes):
    interleaved = rows[::3] + rows[1::3] + rows[2::3]
    pq.write_table(pa.Table.from_pylist(interleaved), tmp_path / "rows.parquet")
    return yaml_job.write(
        tmp_path,
        {
            "name": "levels",
            "model": {"source": model, "dtype": "float32"},
            "mask": "segment",
            "input": {"path": "rows.parquet"},
            "prompt": {
                "segment_by": "part",
                "messages": [
                    {"role": "system", "content": "{system}"},
                    {"role": "user", "content": [{"text": "{rubric}"}, {"text": "{text}"}, {"text": "{ask}"}]},
                ],
            },
            "sampling_params": {"max_tokens": 4},
            "output": {"path": "out", "max_rows_per_file": 7},
            **changes,
        },
    )


def outcome(path, run=run_here):
    summary = run(path)
    store = open_store(summary.output)
    manifest = load_manifest(store)
    assert manifest is not None
    return summary, manifest, pq.read_table(summary.output).to_pylist()


@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_run_with_four_levels_of_sharing_and_one_worker_computes_the_plan_exactly(tmp_path, model_directory, mask):
    summary, manifest, rows = outcome(write_job(tmp_path, model_directory, LEVELS, mask=mask))
    assert summary.tokens_computed == manifest.stats["tokens_distinct"]
    assert (
        summary.tokens_requested == manifest.stats["tokens_requested"] == sum(row["num_input_tokens"] for row in rows)
    )
    assert summary.tokens_computed == sum(row["num_input_tokens"] - row["num_cached_tokens"] for row in rows)
    assert summary.tokens_computed < summary.tokens_requested / 3
    assert len(manifest.units) == 7


def test_run_with_two_workers_computes_at_most_the_plans_bound(local_ray, tmp_path, model_directory):
    workers = {"min_size": 2, "max_size": 2}
    summary, manifest, _ = outcome(write_job(tmp_path, model_directory, LEVELS, workers=workers), run)
    distinct, extra = manifest.stats["tokens_distinct"], manifest.stats["extra_tokens_bound"]
    assert distinct <= summary.tokens_computed <= distinct + extra


def test_run_of_flat_strings_with_a_common_beginning_reuses_it_by_token(tmp_path, model_directory):
    shots = "Q: one? A: 1. Q: two? A: 2. Q: three? A: 3. "
    rows = [{"prompt": f"{shots}Q: {number}? A:"} for number in range(40)]
    summary, _, _ = outcome(write_job(tmp_path, model_directory, rows, mask="causal", prompt={"format": "text"}))
    own = {row["prompt"].removeprefix(shots) for row in rows}
    # bytes are tokens: the shots and "Q: " once, then a radix over the numbers
    assert summary.tokens_computed < len(shots) + sum(len(text) for text in own)
    assert summary.tokens_requested == sum(len(row["prompt"]) for row in rows)


def test_run_answers_equal_with_reuse_on_and_off_and_other_unit_sizes(tmp_path, model_directory):
    answers = []
    for index, changes in enumerate(
        [
            {},
            {"workers": {"enable_prefix_caching": False}, "output": {"path": "out", "max_rows_per_file": 48}},
            {"workers": {"max_num_seqs": 3, "kv_cache_memory_bytes": 2_000_000}},
        ]
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        sampled = {"max_tokens": 6, "temperature": 1.0}
        _, _, rows = outcome(write_job(folder, model_directory, LEVELS, sampling_params=sampled, **changes))
        answers.append({row["src_row"]: row["generated_text"] for row in rows})
    assert len(answers[0]) == len(LEVELS)
    assert all(other == answers[0] for other in answers[1:])
