"""What only a card can tell: `make test-gpu`. Needs no Ray, no network and no model but those made here.

The kernel against its emulation, and everything above it against the CPU.
"""

import itertools
import random
from typing import Any

import pytest
import torch
from tiny_engines import shared_prompts, token_ids
from tiny_models import KINDS, oracle_logits, oracle_model, tiny_model, tiny_tokenizer
from tree_harness import check_long_nodes, check_random_trees
from varlen_emulation import emulated_varlen_attn

from segue.attention.cuda import backend as varlen
from segue.attention.cuda import plan as cuda_plan
from segue.attention.cuda.backend import CudaBackend
from segue.attention.memory.budget import KVShape
from segue.attention.segments import Segment
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams
from segue.workers.sampling.draw import draw
from segue.workers.sampling.sample import Request, Sample
from segue.workers.training.batches import TrainingExample
from segue.workers.training.model import TrainingModel
from segue.workers.training.params import LoraParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0)])
def test_kernel_equals_its_emulation(heads, window):
    """Sequences in any order over one pool, two over the same keys, and garbage behind what counts."""
    torch.manual_seed(0)
    rng = random.Random(1)
    pool = torch.randn(2, 1500, heads[1], 64, dtype=torch.bfloat16)
    lengths_q = [rng.randrange(1, 130) for _ in range(20)]
    lengths_k = [max(q, rng.randrange(1, 400)) for q in lengths_q]  # causal: as many keys as queries, at least
    starts = [rng.randrange(0, 1500 - k) for k in lengths_k]
    starts[3], lengths_k[3] = starts[2], max(lengths_k[2], lengths_q[3])
    pool[:, 1499] = torch.nan  # behind all of them
    query = torch.randn(sum(lengths_q), heads[0], 64, dtype=torch.bfloat16)
    cu = torch.tensor([0, *itertools.accumulate(lengths_q)], dtype=torch.int32)
    starts = torch.tensor([*starts, 0], dtype=torch.int32)
    used = torch.tensor(lengths_k, dtype=torch.int32)
    args = (query, pool[0], pool[1], cu, starts, max(lengths_q), max(lengths_k))
    options = {"scale": 0.125, "window_size": window, "enable_gqa": heads[0] != heads[1]}
    wanted, wanted_lse = emulated_varlen_attn(*args, seqused_k=used, **options)
    on_card = [each.to(CUDA) if isinstance(each, torch.Tensor) else each for each in args]
    kernel: Any = varlen.cuda_kernel()
    got, got_lse = kernel(*on_card, seqused_k=used.to(CUDA), **options)
    torch.testing.assert_close(got_lse.cpu(), wanted_lse, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(got.cpu(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tiles", [(128, 2048), (4, 6)], ids=["usual_tiles", "small_tiles"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_tree_attention_on_the_card_equals_dense_reference(bidirectional, tiles, monkeypatch):
    monkeypatch.setattr(cuda_plan, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(cuda_plan, "KEY_TILE", tiles[1])
    check_long_nodes(OnCard(), bidirectional)


def test_tree_attention_of_random_trees_on_the_card_equals_dense_reference():
    check_random_trees(OnCard())


class OnCard(CudaBackend):
    """Takes the tests' fp32 numbers from the CPU, computes in fp16 on the card, and brings them back."""

    tolerance = 5e-3

    def new_memory(self, shape, budget_bytes):
        on_card: Any = KVShape(shape.num_layers, shape.num_kv_heads, shape.head_dim, torch.float16, CUDA)
        return super().new_memory(on_card, budget_bytes)

    def begin(self, blocks, tails, memory):
        run = super().begin(blocks, tails, memory)
        attend = run.attend

        def moved(layer, query, key, value, how):
            query, key, value = (each.half().to(CUDA) for each in (query, key, value))
            return attend(layer, query, key, value, how).float().cpu()

        run.attend = moved  # type: ignore[method-assign]
        return run


NO_ROOT: Any = None  # drawing does not ask where a row is in the tree


def card_model(kind="llama", dtype=torch.float16):
    return tree_model(tiny_model(kind).to(CUDA, dtype), tiny_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_logits_on_the_card_equal_transformers_on_the_cpu(kind, mask):
    rows = shared_prompts()
    engine = Engine(card_model(kind), EngineConfig(mask=mask, max_num_batched_tokens=64, max_num_seqs=8))
    assert isinstance(engine.core.runner.backend, CudaBackend)
    got = engine.logits(rows).cpu()
    for row, logits in zip(rows, got, strict=True):
        chain = row if mask == "segment" else [Segment(tuple(t for s in row for t in s.token_ids), False)]
        wanted = oracle_logits(oracle_model(kind), chain)[-1]
        assert float((logits - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("kv_tokens", [20_000, 200])
def test_answers_on_the_card_are_those_of_a_row_alone(kv_tokens):
    """Greedy, under the same numbers: in fp16 other batches round otherwise, and a tie may tip; few of these do."""
    model = card_model()
    config = EngineConfig(mask="segment", kv_cache_memory_bytes=kv_tokens * model.kv_shape.bytes_per_token)
    engine = Engine(model, config)
    prompts = shared_prompts(24)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    together = token_ids(engine.generate(prompts, params))
    alone = [token_ids(Engine(model, config).generate([prompt], params))[0] for prompt in prompts]
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 0.9 * len(prompts)
    assert bool(engine.core.scheduler.num_preemptions) == (kv_tokens == 200)


def test_decoding_by_cuda_graphs_gives_the_answers_of_steps_without():
    model = card_model()
    memory = 20_000 * model.kv_shape.bytes_per_token
    prompts = shared_prompts(40)
    params = [SamplingParams(max_tokens=5 + index % 30, ignore_eos=True) for index in range(40)]
    found = []
    for graphs in (False, True):
        config = EngineConfig(mask="segment", kv_cache_memory_bytes=memory, decode_graphs=graphs, max_num_seqs=16)
        engine = Engine(model, config)
        found.append(token_ids(engine.generate(prompts, params)))
    assert engine.core.runner.graphs is not None
    assert engine.core.runner.graphs.num_captures > 1
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 38  # padding may change a product's kernel, and a tie


def test_scores_on_the_card_equal_those_on_the_cpu():
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("", "Once"), ("The sky was", " blue and grey")]
    on_card = Engine(card_model(), EngineConfig()).loglikelihood(pairs)
    on_cpu = Engine(tree_model(tiny_model("llama"), tiny_tokenizer()), EngineConfig()).loglikelihood(pairs)
    for got, wanted in zip(on_card, on_cpu, strict=True):
        assert got.logprob == pytest.approx(wanted.logprob, abs=0.05, rel=0.01)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3),
        SamplingParams(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
        SamplingParams(temperature=0.0, logprobs=3, min_tokens=4),
    ],
)
def test_draws_on_the_card_are_those_on_the_cpu(params):
    def samples():
        requests = [Request(i, (Segment((1, 2, 3), False),), params, str(i).encode(), i, NO_ROOT) for i in range(64)]
        return [Sample(request, 0, None, [5, 6]) for request in requests]  # type: ignore[arg-type]

    torch.manual_seed(0)
    logits = torch.randn(64, 320) * 3
    eos = frozenset({2})
    on_cpu, on_card = samples(), samples()
    wanted = draw(logits, on_cpu, seed=1, eos_token_ids=eos)
    got = draw(logits.to(CUDA), on_card, seed=1, eos_token_ids=eos)
    assert sum(a == b for a, b in zip(got, wanted, strict=True)) >= 62


def test_card_that_runs_out_of_memory_answers_every_row():
    """Half of what a step of all rows needs is there."""
    prompts = [[Segment(tuple(3 + (i * 7 + n) % 250 for n in range(400)), True)] for i in range(48)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    model = tree_model(tiny_model("llama", intermediate_size=16384).to(CUDA, torch.float16), tiny_tokenizer())
    kv = 30_000 * model.kv_shape.bytes_per_token
    config = {"mask": "segment", "max_num_batched_tokens": 16384, "kv_cache_memory_bytes": kv}
    engine = Engine(model, EngineConfig(**config))
    engine.generate(prompts[:1], params)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    wanted = token_ids(Engine(model, EngineConfig(**config)).generate(prompts, params))
    needed = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + kv + needed // 3) / total)
        tight = Engine(model, EngineConfig(**config))
        got = token_ids(tight.generate(prompts, params))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tight.stats.num_shrunk_steps > 0
    assert [len(row[0]) for row in got] == [4] * len(prompts)
    assert sum(a == b for a, b in zip(got, wanted, strict=True)) >= 0.9 * len(prompts)


def test_training_on_the_card_gives_the_logprobs_and_gradients_of_the_cpu():
    batch = [
        TrainingExample((Segment((5, 6, 7, 8), True), Segment((9, 3), False)), (11, 12, 2)),
        TrainingExample((Segment((5, 6), True), Segment((9, 3), False)), (13, 2)),
    ]
    lora = LoraParams(r=4, alpha=8, dropout=0.0)
    found = []
    for device in ("cpu", CUDA):
        model = TrainingModel(tiny_model("llama").to(device), lora, seed=0)
        with torch.no_grad():
            for name, parameter in model.trainable.items():
                torch.manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
        logprobs = model.logprobs(batch)
        (-logprobs.mean()).backward()
        found.append((logprobs.detach().cpu(), [p.grad.cpu() for p in model.trainable.values() if p.grad is not None]))
    (wanted, wanted_gradients), (got, gradients) = found
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    for mine, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-2)


def test_quantised_weights_on_the_card_answer_as_on_the_cpu(tmp_path):
    pytest.importorskip("torchao")
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    int8 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    engines = [
        Engine.from_pretrained(str(tmp_path), dtype="bfloat16", mask="segment", device=device, quantization=int8)
        for device in ("cuda", "cpu")
    ]
    assert type(engines[0].model.model.model.layers[0].mlp.up_proj.weight).__name__ != "Parameter"
    assert engines[0].model.layer_devices == [CUDA] * 3
    prompts = [[Segment(tuple(range(3, 40)), True), Segment(tuple(range(5, 5 + n)), True)] for n in (4, 9)]
    got, wanted = (engine.logits(prompts).cpu() for engine in engines)
    assert (got - wanted).norm() < 2e-2 * wanted.norm()
    outputs = engines[0].generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8]
