"""Generating rows whose tails begin with the end of their prompt: the same answers in fewer calls of attention."""

import math
import random

import pytest
import torch
from tiny_models import oracle_greedy, oracle_model, tiny_model, tiny_tokenizer, tiny_tree_model

from segue.attention.cpu.kv_cache import KVCache
from segue.attention.cpu.plain import CpuBackend
from segue.attention.segments import Segment
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest

SYSTEM = Segment(tuple(range(40, 80)), True)


def prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [(SYSTEM, Segment(tuple(rng.randrange(3, 250) for _ in range(each)), True)) for each in lengths]


def engine(**config):
    return Engine(tiny_tree_model(), EngineConfig(**{"mask": "segment", "backend": "cpu", **config}))


def start(subject, chains, max_tokens=12):
    for index, chain in enumerate(chains):
        subject.add(index, GenerationRequest(chain, SamplingParams(max_tokens=max_tokens, ignore_eos=True), b""))


def finish(subject):
    outputs = {}
    while subject.has_work:
        outputs.update((output.request_id, output) for output in subject.step())
    return [outputs[index].outputs[0].token_ids for index in sorted(outputs)]


def wanted(chains, max_tokens=12):
    return [oracle_greedy(oracle_model(), chain, max_tokens, frozenset()) for chain in chains]


def blocks_of_next_step(subject, monkeypatch):
    seen = []
    real = subject.backend.begin
    with monkeypatch.context() as patch:
        patch.setattr(subject.backend, "begin", lambda blocks, *rest: seen.append(blocks) or real(blocks, *rest))
        subject.step()
    return seen[0]


@pytest.mark.parametrize(("max_copied", "num_blocks"), [(256, 1), (0, 5)])
def test_rows_attend_to_their_own_prompts_in_their_tails_and_to_shared_ones_as_nodes(
    monkeypatch, max_copied, num_blocks
):
    monkeypatch.setattr(KVCache, "max_copied_tokens", max_copied)  # 0, as of memory whose kernel wants no copies
    chains = prompts([3, 8, 17, 40])
    subject = engine()
    start(subject, chains)
    subject.step()
    blocks = blocks_of_next_step(subject, monkeypatch)
    assert len(blocks.cross_blocks) == num_blocks
    assert finish(subject) == wanted(chains)


def test_rows_hold_what_their_tails_lack_and_nothing_else():
    subject = engine()
    start(subject, prompts([3, 8]))
    subject.step()
    running = subject.scheduler.running
    assert [(sample.end.token_ids, sample.end.num_active, sample.end.num_rows) for sample in running] == [
        (SYSTEM.token_ids, 2, 2)
    ] * 2
    assert [(sample.copied.num_active, sample.copied.num_rows) for sample in running if sample.copied] == [(0, 0)] * 2
    finish(subject)
    assert {(node.num_active, node.num_rows) for node in subject.tree} == {(0, 0)}


def test_long_prompt_and_one_that_several_samples_have_stay_nodes(monkeypatch):
    (long, shared) = prompts([300, 40])
    subject = engine()
    params = SamplingParams(max_tokens=4, n=2, temperature=1.0, ignore_eos=True)
    subject.add(0, GenerationRequest(long, SamplingParams(max_tokens=4, ignore_eos=True), b""))
    subject.add(1, GenerationRequest(shared, params, b""))
    subject.step()
    assert len(blocks_of_next_step(subject, monkeypatch).cross_blocks) == 3


def test_prompt_of_which_nobody_else_has_anything_is_all_in_the_tail(monkeypatch):
    chains = [(Segment((10 + number, 20, 30), True), Segment((40, 50), False)) for number in range(3)]
    subject = engine()
    start(subject, chains)
    subject.step()
    assert not blocks_of_next_step(subject, monkeypatch).cross_blocks
    assert finish(subject) == wanted(chains)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_alone_attends_to_nothing_but_its_tail(backend):
    chain = prompts([9])[0]
    subject = engine(backend=backend)
    start(subject, [chain])
    assert finish(subject) == wanted([chain])


def test_row_that_fits_without_a_copy_is_never_out_of_memory_for_one():
    """A tail that began with the prompt would double to more than there is."""
    chain = (Segment(tuple(range(3, 133)), True),)
    subject = engine(kv_cache_memory_bytes=700 * tiny_tree_model().kv_shape.bytes_per_token)
    start(subject, [chain], max_tokens=200)
    subject.step()
    assert subject.scheduler.running[0].copied is not None
    assert finish(subject) == wanted([chain], 200)


def test_row_that_fits_neither_way_is_out_of_memory_and_does_not_try_for_ever():
    chain = (Segment(tuple(range(3, 63)), True),)
    subject = engine(kv_cache_memory_bytes=300 * tiny_tree_model().kv_shape.bytes_per_token)
    start(subject, [chain], max_tokens=440)
    subject.step()
    assert subject.scheduler.running[0].copied is not None
    outputs = [output for _ in range(1000) if subject.has_work for output in subject.step()]
    assert [output.error and str(output.error.code) for output in outputs] == ["ROW_OOM"]


def test_copies_take_no_memory_from_prompts_that_waiting_rows_want():
    waiting = (SYSTEM, Segment(tuple(range(100, 140)), True))
    chains = prompts([30, 31])
    tokens = 40 + 40 + 61 + 2 * 16 + 60
    subject = engine(kv_cache_memory_bytes=tokens * tiny_tree_model().kv_shape.bytes_per_token, max_num_seqs=2)
    start(subject, [waiting], max_tokens=1)
    finish(subject)
    start(subject, [*chains, waiting], max_tokens=4)
    subject.step()
    assert [sample.copied for sample in subject.scheduler.running] == [None, None]
    assert finish(subject) == wanted([*chains, waiting], 4)
    assert subject.stats.num_computed_tokens == 80 + 61


def test_small_nodes_of_a_few_rows_are_copied_for_each(monkeypatch):
    chains = [(SYSTEM, Segment((7, 8), True), Segment((100 + number, 5), True)) for number in range(3)]
    subject = engine()
    start(subject, chains)
    subject.step()
    assert len(blocks_of_next_step(subject, monkeypatch).cross_blocks) == 1
    assert finish(subject) == wanted(chains)


def test_prompt_whose_node_was_evicted_goes_on_and_is_computed_again_for_another_row():
    chain, other = prompts([30, 5])
    subject = engine()
    start(subject, [chain, other])
    subject.step()
    sample, _ = subject.scheduler.running
    node = sample.copied
    assert node is not None
    assert (sample.end.token_ids, node.token_ids) == (SYSTEM.token_ids, chain[1].token_ids)
    subject.scheduler.residency.discard(node)
    assert node.kv is None
    subject.add(2, GenerationRequest(chain, SamplingParams(max_tokens=12, ignore_eos=True, seed=1), b""))
    assert finish(subject) == wanted([chain, other, chain])


def test_rows_that_part_from_a_copied_prompt_or_go_on_from_it_have_their_own_answers():
    run = tuple(range(100, 130))
    chains = [(SYSTEM, Segment(run, False))]
    later = [(SYSTEM, Segment((*run[:10], 7, 8), False)), (SYSTEM, Segment((*run, 9, 9), False))]
    subject = engine()
    start(subject, chains)
    subject.step()
    subject.step()
    for index, chain in enumerate(later, 1):
        subject.add(index, GenerationRequest(chain, SamplingParams(max_tokens=12, ignore_eos=True), b""))
    assert finish(subject) == wanted([*chains, *later])


def test_memory_too_small_for_copies_leaves_prompts_where_they_are():
    chains = prompts([30, 31, 32, 33])
    subject = engine(kv_cache_memory_bytes=tiny_tree_model().kv_shape.bytes_per_token * (40 + 126 + 5 * 16))
    start(subject, chains, max_tokens=6)
    subject.step()
    assert [sample.copied for sample in subject.scheduler.running] == [None] * 4
    assert finish(subject) == wanted(chains, 6)
    assert subject.stats.num_preemptions == 0


def test_numbers_of_a_prompt_that_ends_in_nan_are_forgotten_where_they_were_copied_from():
    chain = prompts([5])[0]
    (poison, *_), *_ = wanted([chain])
    assert poison not in {token for segment in chain for token in segment.token_ids}
    model = tree_model(tiny_model("llama"), tiny_tokenizer())
    with torch.no_grad():  # not the head, which is another tensor
        model.model.get_input_embeddings().weight[poison] = math.nan
    subject = Engine(model, EngineConfig(mask="segment", backend="cpu"))
    start(subject, [chain])
    subject.step()
    node = subject.scheduler.running[0].copied
    assert node is not None
    (output,) = subject.step()
    assert output.error is not None
    assert node.kv is None


def test_generating_rows_stand_in_the_order_of_their_tails(monkeypatch):
    """Also when rows have ended, and others have taken their places: nothing is gathered."""
    seen = []
    begin = CpuBackend.begin

    def spied(self, blocks, tails, memory):
        run = begin(self, blocks, tails, memory)
        seen.extend(isinstance(batch.rows, slice) for batch in run.memory.tails)
        return run

    monkeypatch.setattr(CpuBackend, "begin", spied)
    subject = engine(max_num_seqs=6)
    prompts = [[Segment(tuple(range(3, 3 + 2 + n % 5)), True)] for n in range(20)]
    params = [SamplingParams(max_tokens=1 + (7 * n) % 11, ignore_eos=True) for n in range(20)]
    subject.generate(prompts, params)
    assert len(seen) > 10
    assert all(seen)
