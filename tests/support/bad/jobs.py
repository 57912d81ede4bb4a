"""Jobs that must be refused before any work, by the numbers of the bad-input matrix: C1 to C7 here, the job file.

Values of its keys are in `bad.options`, the dataset and the output in `bad.data`, types of columns in `bad.columns`,
the model and the prompt in `bad.models`.
`make script RUN=tests/faults/bad_inputs.py` prints what was expected of each and what came.
"""

from pathlib import Path

from bad.cases import OK, Cases, text_job
from bad.columns import COLUMNS
from bad.data import DATA
from bad.models import MODELS
from bad.options import OPTIONS

GOOD_TEXT = "name: job\nmodel: {source: echo}\ninput: {path: in}\noutput: {path: out}\n"
JOB_FILES = Cases()

JOB_FILES.cases("C1", "unknown key", r"did you mean 'sampling_params'", [{"samplng_params": {}}])
JOB_FILES.cases("C1", "unknown key in a section", r"did you mean 'max_tokens'", [{"sampling_params": {"max_token": 5}}])


@JOB_FILES.case("C2", "a key twice", r"job\.yaml:6: seed: got the key a second time")
def key_twice(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "seed: 1\nseed: 2\n")


@JOB_FILES.case("C3", "a YAML tag that makes Python objects", r"tag")
def python_tag(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "seed: !!python/object/apply:os.getpid []\n")


@JOB_FILES.case("C4", "an alias bomb", r"alias|anchor")
def alias_bomb(folder: Path) -> Path:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)
    ]
    return text_job(folder, GOOD_TEXT + "\n".join(lines))


@JOB_FILES.case("C4", "a job file of 2 MB", r"1,048,576|1 MiB|too large|bytes")
def huge_file(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "#" * 2**21)


for value in ("1_0", "12:30", "1.10"):

    @JOB_FILES.case("C5", f"name: {value}", r"name: ")
    def surprise(folder: Path, value: str = value) -> Path:
        return text_job(folder, GOOD_TEXT.replace("name: job", f"name: {value}"))


@JOB_FILES.case("C5", "name: no, which is a word here", OK)
def word(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT.replace("name: job", "name: no"))


JOB_FILES.cases(
    "C6",
    "a number out of range",
    r"sampling_params\.|limits\.|workers\.",
    [
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"top_p": 0}},
        {"sampling_params": {"top_p": 1.5}},
        {"sampling_params": {"max_tokens": 0}},
        {"sampling_params": {"n": 0}},
        {"limits": {"max_model_len": 10**9}},
        {"limits": {"row_cpu_s": 0}},
        {"limits": {"row_memory_bytes": 1000}},
        {"workers": {"max_size": -1}},
        {"workers": {"max_num_seqs": 0}},
    ],
)


@JOB_FILES.case("C6", "temperature: .nan", r"sampling_params\.temperature")
def nan_temperature(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "sampling_params: {temperature: .nan}\n")


JOB_FILES.cases("C7", "options that contradict each other", r"max_size", [{"workers": {"min_size": 3, "max_size": 2}}])
JOB_FILES.cases(
    "C7",
    "options of another task",
    r"means nothing to task",
    [{"task": "perplexity", "prompt": {"format": "text", "text": "{prompt}"}, "sampling_params": {"n": 2}}],
)


CASES = [*JOB_FILES, *OPTIONS, *DATA, *COLUMNS, *MODELS]
