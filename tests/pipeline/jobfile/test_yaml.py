"""The job file as text: YAML that is strict, overrides of the command line, bytes that are no job file."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ready_jobs import config_of
from yaml_job import MINIMAL, load, refusal, refusals

from segue.pipeline.problems import JobRefused


def test_override_values_are_yaml_and_win_over_the_file(tmp_path):
    overrides = ("sampling_params.max_tokens=64", "seed=3", "output.columns=[a, b]", "input.limit=", "mask=segment")
    job = load(tmp_path, MINIMAL + "seed: 1\n", *overrides)
    assert (job.sampling_params.max_tokens, job.seed, job.mask) == (64, 3, "segment")
    assert (job.output.columns, job.input.limit) == (("a", "b"), None)


def test_override_reaches_into_lists(tmp_path):
    text = MINIMAL + "prompt: {messages: [{role: user, content: a}]}\n"
    job = load(tmp_path, text, "prompt.messages.0.content=b")
    assert job.prompt.messages is not None
    assert job.prompt.messages[0].content == "b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling_params.max_token=1", "'max_tokens'"),
        ("nothing.at.all=1", "nothing"),
        ("name.x=1", "'x' below name"),
        ("seed", "key=value"),
        ("=1", "key=value"),
        ("seed..x=1", "key=value"),
        ("seed=[1", "valid YAML"),
        ("seed=&a 1", "anchor"),
        ("seed=one", "whole number"),
    ],
)
def test_override_that_cannot_be_set_is_refused(tmp_path, override, words):
    message = refusal(tmp_path, MINIMAL, override)
    assert message.startswith("--set")
    assert words in message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: &x 1\nb: 2\n", 1, "anchor"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "tag"),
        ("a: !!str 1\n", 1, "tag"),
        ("a: 1\n---\nb: 1\n", 2, "second document"),
        ("%YAML 1.1\n---\na: no\n", 2, "YAML 1.2"),
        ("a: [1\n", 2, "valid YAML"),
        ("a:\n\tb: 1\n", 2, "valid YAML"),
        ("a: " + "[" * 40 + "]" * 40 + "\n", 1, "nested"),
    ],
)
def test_yaml_what_is_not_plain_is_refused_with_its_line(tmp_path, text, line, words):
    message = refusal(tmp_path, text)
    assert message.startswith(f"job.yaml:{line}: ")
    assert words in message


def test_yaml_alias_bomb_is_refused_by_name(tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert any("alias *a" in line for line in refusals(tmp_path, bomb))


@pytest.mark.parametrize("text", ["", "- 1\n", "just text\n", "# only a comment\n"])
def test_yaml_without_a_mapping_on_top_is_refused(tmp_path, text):
    assert "a mapping of keys" in refusal(tmp_path, text)


def test_yaml_words_of_version_1_1_stay_strings(tmp_path):
    job = load(tmp_path, MINIMAL.replace("triage", "no").replace("tickets", "12:30"))
    assert job.name == "no"
    assert job.input.path == (str(tmp_path / "12:30"),)


def test_yaml_key_that_is_no_string_is_refused(tmp_path):
    assert "the key 1" in refusal(tmp_path, MINIMAL + "1: x\n")


def test_yaml_number_that_is_none_is_refused_not_raised(tmp_path):
    assert any(line.startswith("job.yaml:5: seed: ") for line in refusals(tmp_path, MINIMAL + "seed: 2020-13-45\n"))


def test_job_file_too_large_is_refused(tmp_path):
    assert "1,000,000 bytes" in refusal(tmp_path, MINIMAL + "#" * 1_000_000)


def test_job_file_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"name: x\nmask: \xff\n")
    with pytest.raises(JobRefused, match=r"job\.yaml:2: .*UTF-8"):
        config_of(tmp_path / "job.yaml")


def test_job_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(JobRefused, match=r"none\.yaml.*No such file"):
        config_of(tmp_path / "none.yaml")


@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>?#'\"\n \t,%0.é"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_job_any_text_is_refused_with_problems_only(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text)
    with pytest.raises(JobRefused) as refused:
        config_of(file)
    assert all(str(problem).isprintable() for problem in refused.value.problems)
