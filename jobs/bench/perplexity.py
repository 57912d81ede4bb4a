"""The log-likelihood of a text of 20,000 tokens in rolling windows, against lm-evaluation-harness, and its memory.

    python -m segue.jobs.bench.perplexity --data ../shared/data/commonsense

The log-likelihoods must agree. The peak of resident memory above that of the loaded model is measured in a process of
its own for each length. Needs the extra `peers`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from segue.jobs.bench.arc import load
from segue.jobs.bench.machine import SOURCE, machine, say
from segue.jobs.bench.peers import LmEval
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.models.support import checked_config

MAX_MODEL_LEN = 1024
LENGTHS = (2_000, 20_000)
TOLERANCE = 1e-5  # of the log-likelihood, relative
MAX_GROWTH = 1.1  # of KV memory from the shorter text to the longer; the shorter one does not fill its last window


def main() -> None:
    args = _arguments()
    if args.measure is not None:
        print(json.dumps(_measured(args.data, args.measure)))
        return
    command = [sys.executable, "-m", "segue.jobs.bench.perplexity", "--data", str(args.data), "--measure"]
    runs = [json.loads(subprocess.run([*command, str(n)], capture_output=True, check=True).stdout) for n in LENGTHS]
    text = _text(args.data, LENGTHS[-1])
    started = time.perf_counter()
    wanted = LmEval(str(safetensors_directory(locate(SOURCE))), "float32", max_length=MAX_MODEL_LEN).rolling_score(text)
    report: dict[str, Any] = {"benchmark": "perplexity", **machine(), "max_model_len": MAX_MODEL_LEN, "runs": runs}
    report |= {"lm_eval_logprob": wanted, "lm_eval_seconds": time.perf_counter() - started}
    report["relative_error"] = abs(runs[-1]["logprob"] - wanted) / abs(wanted)
    for run in runs:
        say(
            f"{run['tokens']:,} tokens: log-likelihood {run['logprob']:.3f}, {run['seconds']:.1f} s, "
            f"KV at most {run['max_kv_bytes']:,} bytes, resident memory + {run['resident_growth']:,}"
        )
    say(f"lm-evaluation-harness: {wanted:.3f}, relative error {report['relative_error']:.1e}")
    growth = runs[-1]["max_kv_bytes"] / runs[0]["max_kv_bytes"]
    if report["relative_error"] > TOLERANCE or growth > MAX_GROWTH:
        raise SystemExit(f"wrong: relative error {report['relative_error']:.1e}, KV memory grew {growth:.2f} times")
    print(json.dumps(report))


def _measured(data: Path, num_tokens: int) -> dict[str, Any]:
    """Score one text in this process."""
    model = load_model(SOURCE, dtype="float32")
    engine = Engine(model, EngineConfig(mask="causal", max_model_len=MAX_MODEL_LEN))
    text = _text(data, num_tokens)
    before = _peak_resident()
    started = time.perf_counter()
    (score,) = engine.loglikelihood_rolling([text])
    return {
        "tokens": score.num_tokens,
        "logprob": score.logprob,
        "seconds": time.perf_counter() - started,
        "max_kv_bytes": engine.stats.max_kv_bytes,
        "resident_growth": _peak_resident() - before,
    }


def _text(data: Path, num_tokens: int) -> str:
    """The beginning of the training questions, cut at a token."""
    _, tokenizer = checked_config(safetensors_directory(locate(SOURCE)))
    text = "\n\n".join(f"{each.question} {each.choices[each.label]}" for each in load(data / "arc_easy-train.jsonl"))
    return tokenizer.decode(tokenizer(text, verbose=False).input_ids[:num_tokens])


def _peak_resident() -> int:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="rolling log-likelihood against lm-evaluation-harness")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with arc_easy-train.jsonl, LLM-Adapters' format"
    )
    parser.add_argument("--measure", type=int, help="only this many tokens, in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
