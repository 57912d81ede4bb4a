"""vLLM in its own environment, controlled by `jobs/bench/peers.py` line by line. Imports nothing of Segue.

The first line is JSON for `vllm.LLM`. Each further one is {"score": [[context, continuation], ...]} or {"generate":
[token ids, ...], "max_tokens": n}, and is computed once with an empty cache. Prints a JSON line for each: `version` for
the first, then `seconds` and `logprobs` or `token_ids`.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    # The CPU build does not start without the first two. All cores.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no process of it spins while others are timed
    import vllm  # pyright: ignore[reportMissingImports]

    engine = vllm.LLM(enable_prefix_caching=True, **json.loads(sys.stdin.readline()))
    _say({"version": vllm.__version__})
    for line in sys.stdin:
        job = json.loads(line)
        engine.reset_prefix_cache()
        started = time.perf_counter()
        found = _score(engine, job["score"]) if "score" in job else _generate(engine, **job)
        _say({"seconds": time.perf_counter() - started, **found})


def _score(engine: Any, pairs: list[list[str]]) -> dict[str, Any]:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    tokenizer = engine.get_tokenizer()
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    wholes = [tokenizer.encode(context + rest) for context, rest in pairs]
    starts = [len(tokenizer.encode(context)) for context, _ in pairs]
    outputs = engine.generate([{"prompt_token_ids": whole} for whole in wholes], params, use_tqdm=False)
    return {
        "logprobs": [
            sum(output.prompt_logprobs[i][whole[i]].logprob for i in range(start, len(whole)))
            for output, whole, start in zip(outputs, wholes, starts, strict=True)
        ]
    }


def _generate(engine: Any, generate: list[list[int]], max_tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in generate], params, use_tqdm=False)
    return {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}


def _say(found: dict[str, Any]) -> None:
    print("segue-bench " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
