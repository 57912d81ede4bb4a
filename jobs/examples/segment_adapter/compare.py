"""The effect of the adapter as Markdown: numbers by mask and adapter, and answers side by side.

    python jobs/examples/segment_adapter/compare.py > jobs/examples/segment_adapter/RESULTS.md

Reads the outputs of `score.yaml` and `answers.yaml` on unseen prompts, which README.md says how to make. Knows folders
and columns; no model.
"""

import sys
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segue.jobs.analysis.evaluate import Group, evaluate
from segue.jobs.analysis.judge import judging_of

OUT = Path(__file__).parent / "out"
ARMS = {
    "causal": "no adapter, causal mask",
    "segment": "no adapter, segment mask",
    "adapted": "adapter, segment mask",
}
COLUMNS = (
    *("prompts", "n", "model", "log-likelihood of the causal model's answer, mean"),
    *("a token, mean", "the whole answer is the likeliest, 95%"),
)
NUM_SHOWN = {"general": 14, "ticket": 6}


def main() -> None:
    print("# The adapter against the model without it\n")
    print("Written by `compare.py`; README.md says what was run.\n")
    print("\n".join(numbers()))
    print("\n".join(side_by_side()))


def numbers() -> list[str]:
    """How likely the causal model's answers are, and how often every token of an answer is the most likely one."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for kind in NUM_SHOWN:
        for arm, name in ARMS.items():
            group, tokens = _group(arm, kind)
            if group.mean_logprob is None or group.acc is None or group.acc_interval is None:
                raise SystemExit(f"{OUT / f'scores-{arm}'} has no scores")
            low, high = group.acc_interval
            a_token = group.mean_logprob * group.n / tokens
            greedy = f"{group.acc:.3f} ({low:.3f} to {high:.3f})"
            lines.append(f"| {kind} | {group.n} | {name} | {group.mean_logprob:.2f} | {a_token:.3f} | {greedy} |")
    return lines


def side_by_side() -> list[str]:
    """Whole answers to random prompts."""
    answers = {arm: _answers(arm) for arm in ARMS}
    lines = []
    for kind, count in NUM_SHOWN.items():
        rows = [row for row in answers["causal"].values() if row["kind"] == kind]
        for row in Random(kind).sample(rows, count):
            lines += ["", f"**{_quoted(row['messages'][-1])}**", ""]
            lines += [f"- {name}: {_quoted(answers[arm][row['src_row']])}" for arm, name in ARMS.items()]
    return ["", "## Twenty answers, drawn by lot", *lines]


def _group(arm: str, kind: str) -> tuple[Group, int]:
    """The statistics of an arm on one kind of prompts, and how many tokens were scored."""
    folder = OUT / f"scores-{arm}"
    judging = judging_of(by="kind", label=None, regex=None, preset=None, ignore_case=False)
    evaluation, _ = evaluate(str(folder), judging)
    table = _table(folder, ["kind", "num_tokens"])
    tokens = sum(row["num_tokens"] or 0 for row in table.to_pylist() if row["kind"] == kind)
    return next(group for group in evaluation.groups if group.name == kind), tokens


def _answers(arm: str) -> dict[int, dict[str, Any]]:
    folder = OUT / ("answers-test" if arm == "causal" else f"answers-{arm}")
    table = _table(folder, ["src_row", "kind", "messages", "generated_text"])
    return {row["src_row"]: row for row in table.to_pylist()}


def _table(folder: Path, columns: list[str]) -> pa.Table:
    files = sorted(folder.glob("part-*.parquet"))
    if not files:
        sys.exit(f"{folder} has no output; README.md says what makes it")
    return pa.concat_tables(pq.read_table(path, columns=columns) for path in files)


def _quoted(value: dict[str, Any]) -> str:
    """A message's last text, or an answer, on one line."""
    text = value["generated_text"] if "generated_text" in value else value["content"][-1]["text"]
    return " ".join((text or "(nothing)").split()).replace("*", r"\*").replace("<", "&lt;")


if __name__ == "__main__":
    main()
