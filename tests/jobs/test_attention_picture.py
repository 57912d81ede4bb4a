"""The picture of attention shows what the rule allows, and nothing else."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml_job
from commands import last_line, segue
from tiny_models import tiny_model

from segue.attention.segments import Segment, canonical_segments
from segue.attention.visibility import block_sequence_ids, visible
from segue.workers.models.attention_maps import attention_map
from segue.workers.models.support import layer_windows

SEGMENTS = [Segment((5, 6, 7, 8), True), Segment((9, 10, 11), True), Segment((12, 13), False)]


@pytest.mark.parametrize("mask", ["causal", "segment"])
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_attention_map_has_weights_just_where_the_rule_lets_tokens_look(mask, layer):
    weights = attention_map(tiny_model("llama"), SEGMENTS, mask, layer)
    may_see = visible(block_sequence_ids(canonical_segments(SEGMENTS, mask=mask)))
    assert torch.equal(weights > 0, may_see)
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))


@pytest.mark.parametrize("mask", ["segment", "causal"])
@pytest.mark.parametrize(("kind", "layer"), [("mistral windowed", 1), ("olmo3 windowed", 0), ("olmo3 windowed", 1)])
def test_attention_map_of_a_layer_shows_its_window(kind, layer, mask):
    model = tiny_model(kind)
    segments = [*SEGMENTS, Segment(tuple(range(50, 60)), False)]
    weights = attention_map(model, segments, mask, layer)
    seen = visible(block_sequence_ids(canonical_segments(segments, mask=mask)), layer_windows(model.config)[layer])
    assert torch.equal(weights > 0, seen)


def test_attention_map_of_all_layers_is_the_mean_of_each():
    model = tiny_model("llama")
    each = torch.stack([attention_map(model, SEGMENTS, "segment", layer) for layer in range(3)])
    torch.testing.assert_close(attention_map(model, SEGMENTS, "segment"), each.mean(0))


def test_layer_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="layers 0 to 2, got 3"):
        attention_map(tiny_model("llama"), SEGMENTS, "segment", 3)


@pytest.fixture
def job_file(here, tmp_path, model_directory):
    rows = [{"prompt": "what is $x_1^2$?"}, {"prompt": None}, {"prompt": "and this one?"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    job = {
        "name": "picture",
        "model": {"source": model_directory, "dtype": "float32"},
        "input": {"path": "rows.parquet"},
        "output": {"path": "out"},
    }
    return yaml_job.write(tmp_path, job)


def test_attention_command_writes_a_picture_and_tells_the_segments(job_file, tmp_path):
    picture = tmp_path / "seen.png"
    code, out, err = segue("attention", job_file, "--row", "2", "--picture", picture)
    assert code == 0, err
    told = last_line(out)
    assert (told["row"], told["picture"]) == ("rows.parquet:2", str(picture))
    assert [span["bidirectional"] for span in told["segments"]] == [True, False]
    assert told["segments"][-1]["stop"] == told["tokens"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "3"], "--row: got 3, wanted a row of the input, 0 to 2"),
        (["--row", "1"], "--row: got 1, which has NULL_PROMPT"),
        (["--set", "model.source=echo"], "model.source: 'echo'"),
        (["--layer", "7"], "--layer: the model has layers 0 to 2, got 7"),
    ],
)
def test_attention_command_refuses_what_it_cannot_draw(job_file, tmp_path, arguments, message):
    code, _, err = segue("attention", job_file, "--picture", tmp_path / "a.png", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "a.png").exists()


def test_attention_command_refuses_a_place_that_is_none_before_any_work(job_file, tmp_path):
    for name in ("nowhere/a.png", "a.bmp"):
        code, _, err = segue("attention", job_file, "--picture", tmp_path / name)
        assert code == 2
        assert "--picture" in err
