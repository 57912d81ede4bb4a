"""A model with adapters to train, and the log-probabilities of given answers under the mask.

Attention is torch's own over a dense mask, made by the rule that serving obeys (`attention/visibility.py`). The rows
of a batch differ and their keys are used once, so a tree would save nothing. Rows are padded on the right, where no
earlier token looks. Only the positions that predict an answer's token go through the vocabulary.

Shapes: `B` rows of a batch, `S` their longest, `N` answer tokens of all, `E` hidden width, `V` vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segue.attention.visibility import block_sequence_ids, visible
from segue.workers.devices.devices import resolve_device
from segue.workers.errors import ModelRefused
from segue.workers.models.load import load_weights
from segue.workers.models.long_rope import LongRope
from segue.workers.models.quantization import own_quantization
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.models.support import checked_config, layer_windows
from segue.workers.models.tree_model import (
    PROBE_TOLERANCE,
    check_attention_call,
    eos_token_ids,
    own_logits,
    probe_ids,
    vocabulary_logits,
    window_of,
)
from segue.workers.training.batches import TrainingExample
from segue.workers.training.params import LoraParams

ATTENTION_NAME = "segue_training"
SHORT_TOKENS = 160  # on a CPU plain products compute the attention of rows of up to so many tokens
MAX_LOGITS = 1 << 24  # fp32 logits in memory at once: 64 MiB; more are computed again in the backward pass


@dataclass(frozen=True, slots=True)
class TrainingMask:
    """Additive masks, `[B, 1, S, S]` or `[1, 1, S, S]` in the model's precision."""

    bias: Tensor | None  # None if every row is causal
    by_window: Mapping[int, Tensor] = field(default_factory=dict)  # for layers with a window that hides something


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segue_mask: TrainingMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Has the signature of transformers' attention; query `[B, H, S, D]` -> `[B, S, H, D]`."""
    if segue_mask is None:
        raise ModelRefused(f"{type(module).__name__} does not pass extra arguments to its attention")
    check_attention_call(module, attention_mask, kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelRefused(f"{type(module).__name__} caps its scores or has attention sinks: it cannot be trained here")
    window = window_of(module, kwargs) if segue_mask.by_window else None
    bias = segue_mask.bias if window is None else segue_mask.by_window[window]
    if query.device.type == "cpu" and query.shape[2] <= SHORT_TOKENS:
        out = _short_attention(query, key, value, bias, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return out.transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _short_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """query `[B, H, S, D]`, key, value `[B, Hkv, S, D]` -> `[B, H, S, D]`, by plain products in fp32.

    With the backward pass 1.3 times (160 tokens) to 3.5 times (45 tokens) as fast as torch's flash kernel for CPUs.
    """
    batch, heads, length, width = query.shape
    grouped = (batch * key.shape[1], -1, width)  # [B * Hkv, G * S or S, D]: each key is read once for its group
    q, k, v = (part.float().reshape(grouped) for part in (query, key, value))
    scores = torch.bmm(q * scale, k.transpose(1, 2)).view(batch, heads, length, length)
    if bias is None:
        bias = scores.new_full((length, length), -torch.inf).triu_(1)
    weights = (scores + bias).softmax(dim=-1)
    return torch.bmm(weights.view(len(q), -1, length), v).view(query.shape).to(query.dtype)


class TrainingModel:
    """A transformers model with LoRA adapters in fp32 over frozen weights."""

    def __init__(self, model: Any, lora: LoraParams, *, seed: int) -> None:
        """Changes `model`, whose weights are in memory. Raises ModelRefused for modules that it does not have."""
        wanted = own_logits(model)
        self._windows = {*layer_windows(model.config)}
        self._long_rope = LongRope.install(model)
        _register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        model.requires_grad_(False)
        self._model = model
        self.peft = _with_adapters(model, lora, seed)
        self._probe(wanted)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        lora: LoraParams,
        *,
        dtype: torch.dtype,
        revision: str | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> "TrainingModel":
        """Load and check. Raises ModelRefused with the reason."""
        directory = safetensors_directory(locate(source, revision))
        config, _ = _checked_plain_config(directory)
        return cls(load_weights(directory, config, dtype).to(resolve_device(device)), lora, seed=seed)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapters' weights by name, in the model's order."""
        return {name: parameter for name, parameter in self.peft.named_parameters() if parameter.requires_grad}

    @property
    def device(self) -> torch.device:
        return self._model.device

    def use_gradient_checkpointing(self) -> None:
        """Keep only the inputs of each layer, and compute the rest again in the backward pass. Raises ModelRefused."""
        try:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise ModelRefused(f"training.gradient_checkpointing: {error}") from None

    def train(self, is_training: bool) -> None:
        """Switch dropout on or off."""
        self.peft.train(is_training)

    def logprobs(self, batch: Sequence[TrainingExample]) -> Tensor:
        """`[N]` fp32: the log-probability of each answer token, example by example."""
        hidden = self._hidden(batch)
        rows, columns, targets = [], [], []
        for row, example in enumerate(batch):
            start = example.num_fed_tokens - len(example.answer)
            rows += [row] * len(example.answer)
            columns += range(start, example.num_fed_tokens)
            targets += example.answer
        states = hidden[torch.tensor(rows), torch.tensor(columns)]
        return self._logprobs_of(states, torch.tensor(targets, device=self.device))

    def save_adapter(self, directory: Path, *, base_model: str) -> None:
        """Write the adapter in PEFT's format. `base_model` is the name of its base there."""
        config = self.peft.peft_config["default"]
        config.base_model_name_or_path = base_model
        self.peft.save_pretrained(directory, save_embedding_layers=False)  # "auto" would ask the hub
        (directory / "README.md").unlink(missing_ok=True)  # an empty model card
        written = directory / "adapter_config.json"
        values = json.loads(written.read_bytes())
        values["target_modules"] = sorted(values["target_modules"])  # PEFT writes a set, whose order changes
        written.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _hidden(self, batch: Sequence[TrainingExample]) -> Tensor:
        """`[B, S, E]` after the last norm."""
        longest = max(example.num_fed_tokens for example in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        segment_ids = torch.full((len(batch), longest), -1)
        for row, example in enumerate(batch):
            tokens = [token for segment in example.segments for token in segment.token_ids] + list(example.answer[:-1])
            ids[row, : len(tokens)] = torch.tensor(tokens)
            segment_ids[row, : len(tokens)] = block_sequence_ids(example.segments, len(example.answer) - 1)
        with self._long_rows(batch):
            decoder = self._model.get_decoder()
            output = decoder(input_ids=ids.to(self.device), use_cache=False, segue_mask=self._mask(segment_ids))
        return output.last_hidden_state

    def _long_rows(self, batch: Sequence[TrainingExample]) -> AbstractContextManager[None]:
        """As in serving: which set of rotary positions a row has depends on its own length alone."""
        if self._long_rope is None:
            return nullcontext()
        lengths = torch.tensor([[example.num_fed_tokens] for example in batch], device=self.device)
        return self._long_rope.rows(lengths > self._long_rope.most_short)

    def _mask(self, segment_ids: Tensor) -> TrainingMask:
        is_causal = not bool((segment_ids >= 0).any())
        windows = {window for window in self._windows if window is not None}
        if all(window >= segment_ids.shape[1] for window in windows):
            windows = set()  # they hide nothing
        return TrainingMask(
            None if is_causal else self._bias(segment_ids, None),
            {window: self._bias(segment_ids, window) for window in windows},
        )

    def _bias(self, segment_ids: Tensor, window: int | None) -> Tensor:
        """`[B, 1, S, S]`"""
        seen = visible(segment_ids, window)[:, None]
        return torch.zeros(1, dtype=self._model.dtype).masked_fill(~seen, -torch.inf).to(self.device)

    def _logprobs_of(self, states: Tensor, targets: Tensor) -> Tensor:
        """states `[N, E]`, targets `[N]` -> `[N]`. At most MAX_LOGITS logits are in memory at once."""
        size = max(1, MAX_LOGITS // int(self._model.config.get_text_config().vocab_size))
        if len(targets) <= size:
            return self._target_logprobs(states, targets)
        pieces = [
            checkpoint(self._target_logprobs, part, wanted, use_reentrant=False)
            for part, wanted in zip(states.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(pieces)

    def _target_logprobs(self, states: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(vocabulary_logits(self._model, states).float(), targets, reduction="none")

    @torch.no_grad()
    def _probe(self, wanted: Tensor) -> None:
        """New adapters change nothing yet, so a short causal prompt must give the model's own logits."""
        self.train(False)
        ids = torch.tensor([probe_ids(self._model)], device=self.device)
        mask = self._mask(torch.full(ids.shape, -1))
        hidden = self._model.get_decoder()(input_ids=ids, use_cache=False, segue_mask=mask)
        got = vocabulary_logits(self._model, hidden.last_hidden_state[:, -1])[0].float()
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-6))
        if not error <= PROBE_TOLERANCE[self._model.dtype]:
            raise ModelRefused(
                f"model of type {self._model.config.model_type!r} cannot be trained: its logits differ from its own by "
                f"{error:.2%} of their norm"
            )


def check_trainable(source: str, revision: str | None, lora: LoraParams, answer_end_id: int) -> None:
    """Raises ModelRefused unless a model has the layers to train, and stops where answers end. Reads no weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    _import_peft()
    directory = safetensors_directory(locate(source, revision))
    config, tokenizer = _checked_plain_config(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    _target_modules(model, lora)
    stops = eos_token_ids(model, tokenizer)
    if answer_end_id not in stops:
        raise ModelRefused(
            f"answers would end with token {answer_end_id}, as the prompts' template ends them, and generation stops "
            f"at {', '.join(map(str, sorted(stops))) or 'none'}: name it in eos_token_id of generation_config.json"
        )


def _checked_plain_config(directory: Path) -> tuple[Any, Any]:
    config, tokenizer = checked_config(directory)
    if own_quantization(config) is not None:
        raise ModelRefused("model.source: its weights are quantised, and adapters are trained over plain ones")
    return config, tokenizer


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, training_attention)


def _with_adapters(model: Any, lora: LoraParams, seed: int) -> Any:
    _import_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=_target_modules(model, lora),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _import_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelRefused("training needs the peft package: pip install 'segue[finetune]'") from error


def _target_modules(model: Any, lora: LoraParams) -> list[str]:
    """The names of the layers that get adapters. Raises ModelRefused for one that no layer has."""
    # PEFT leaves out a name that no module has, if another one has some.
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight or model.config.get_text_config().tie_word_embeddings
    linear = {
        name.rpartition(".")[2]: module is head
        for name, module in model.named_modules()
        # When it is merged for serving, an adapter of a tied head would change the embedding too.
        if isinstance(module, nn.Linear) and not (is_tied and module is head)
    }
    if lora.target_modules == "all-linear":
        return sorted(name for name, is_head in linear.items() if not is_head)
    missing = [name for name in lora.target_modules if name not in linear]
    if missing:
        raise ModelRefused(
            f"lora.target_modules: a model of type {model.config.model_type!r} has no linear layer {missing[0]!r}; "
            f"it has {', '.join(sorted(linear))}"
        )
    return list(lora.target_modules)
