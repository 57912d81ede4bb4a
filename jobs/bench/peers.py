"""The tools that Segue is compared with, each with its best settings: transformers and lm-evaluation-harness in this
process, vLLM in a process of its own Python."""

import contextlib
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from segue.jobs.bench.machine import say, seconds_of

MARK = "segue-bench "


class Transformers:
    """Greedy `generate` over left-padded batches. The end-of-sequence token does not end a row."""

    def __init__(self, directory: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, batch_size: int) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in batch])
            seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            whole = self._model.generate(
                ids, attention_mask=seen, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            found += whole[:, width:].tolist()
        return found

    def best_batch_size(self, prompts: Sequence[Sequence[int]], max_tokens: int, sizes: Sequence[int]) -> int:
        """The size with the most rows/s, after a warm-up. Sizes above the number of prompts are left out."""
        sizes = [size for size in sizes if size <= len(prompts)] or [len(prompts)]
        self.generate(prompts[:1], 2, 1)
        rates = {
            size: size / seconds_of(lambda size=size: self.generate(prompts[:size], max_tokens, size)) for size in sizes
        }
        say("transformers rows/s by batch size: " + ", ".join(f"{n}: {rate:.2f}" for n, rate in rates.items()))
        return max(sizes, key=lambda size: rates[size])


class LmEval:
    """lm-evaluation-harness' HF backend on the CPU."""

    def __init__(self, directory: str, dtype: str, max_length: int | None = None) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.models.huggingface import HFLM

        options: dict[str, Any] = {"pretrained": directory, "dtype": dtype, "device": "cpu", "max_length": max_length}
        self._model: Any = HFLM(**options, batch_size=1)  # pyright: ignore

    def scores(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of each pair."""
        from lm_eval.api.instance import Instance

        self._model.batch_size_per_gpu = batch_size
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        return self._model.loglikelihood(requests, disable_tqdm=True)

    def rolling_score(self, text: str) -> float:
        """The log-likelihood of a whole text."""
        from lm_eval.api.instance import Instance

        (found,) = self._model.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
        )
        return found


class Vllm:
    """vLLM with prefix caching, in a process with a Python of its own. `options` go to `vllm.LLM`."""

    def __init__(self, python: str, directory: str, dtype: str, **options: Any) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - as long as the process
        script = str(Path(__file__).with_name("vllm_worker.py"))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([python, script], stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        self.version = str(self._ask({"model": directory, "dtype": dtype, "max_model_len": 2048, **options})["version"])

    def score(self, pairs: Sequence[tuple[str, str]]) -> tuple[float, list[float]]:
        """(seconds, the log-likelihood of each pair by `prompt_logprobs`)"""
        found = self._ask({"score": pairs})
        return found["seconds"], found["logprobs"]

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
        """(seconds, the token ids of each answer)"""
        found = self._ask({"generate": prompts, "max_tokens": max_tokens})
        return found["seconds"], found["token_ids"]

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError with the last lines of vLLM's log if its process has ended."""
        into, out_of = self._process.stdin, self._process.stdout
        if into is None or out_of is None:
            raise RuntimeError("vLLM was started without pipes")
        with contextlib.suppress(BrokenPipeError):  # its log says why
            into.write(json.dumps(job) + "\n")
            into.flush()
        for line in out_of:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._log.seek(0)
        raise RuntimeError(f"vLLM ended:\n{self._log.read()[-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()
