"""The pairs on stdin scored by vLLM's `prompt_logprobs`: run by `jobs/bench/score.py` in vLLM's own environment.

Reads {"model": directory, "dtype": ..., "pairs": [[context, continuation], ...]}; prints one JSON line with `seconds`,
`logprobs`, `version`. Imports nothing of Segue, which is not installed there.
"""

import json
import os
import sys
import time


def main() -> None:
    # Its CPU build does not start without; both cores of a machine like ours.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    job = json.load(sys.stdin)
    engine = LLM(model=job["model"], dtype=job["dtype"], max_model_len=2048, enable_prefix_caching=True)
    tokenizer = engine.get_tokenizer()
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    warm = [{"prompt_token_ids": tokenizer.encode(context + rest)} for context, rest in job["pairs"][:8]]
    engine.generate(warm, params, use_tqdm=False)
    started = time.perf_counter()
    wholes = [tokenizer.encode(context + rest) for context, rest in job["pairs"]]
    starts = [len(tokenizer.encode(context)) for context, _ in job["pairs"]]
    outputs = engine.generate([{"prompt_token_ids": whole} for whole in wholes], params, use_tqdm=False)
    logprobs = [
        sum(output.prompt_logprobs[i][whole[i]].logprob for i in range(start, len(whole)))
        for output, whole, start in zip(outputs, wholes, starts, strict=True)
    ]
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "logprobs": logprobs, "version": vllm.__version__}))


if __name__ == "__main__":
    main()
