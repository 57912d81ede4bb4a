"""Chat templates that trim, merge, insert, date and cut what they are given, and tokenizers of five kinds.

`chat(name, kind)` is an encoder with one template of TEMPLATES and one tokenizer of KINDS.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from segue.attention.segments import Segment
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

DATE = datetime.date(2026, 2, 3)
CONTROLS = (
    *("<s>", "</s>", "<unk>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"),
    *("</tool_response>", "<|turn|>", "<|over|>", "<|said|>", "<U>", "<A>"),
)
# Added tokens that are not special. Two of them part messages in the template `two_openers`.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<U>", "<A>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog and says hello world to you",
    "system user assistant You are a helpful assistant. Cutting Knowledge Date: December 2023",
    "What is the capital of France? It is Paris.\n\nThank you  very much!\n",
)

GENERATE = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + GENERATE
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = (
    "{{ '<|begin_of_text|>' }}"
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + GENERATE
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
    + GENERATE
    + "<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ '<s>' }}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {{ (s if loop.last else '') + m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}<s>( {{ (s if loop.first else '') + m.content.strip() }} )"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}(({{ m.role }}))\n{{ m.content }}</s>\n{% endfor %}"
    + GENERATE
    + "((assistant))\n{% endif %}"
)
VICUNA = (
    "{% if messages[0].role != 'system' %}A polite chat. {% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}" + GENERATE + "ASSISTANT:{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
# Tools, their calls and results, and reasoning, in turns of ChatML.
AGENT = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set c = m.content if m.content is string else '' %}{% set r = '' %}"
    "{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.last and r %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function if call.function is defined else call %}"
    '{{ \'\n\' if c or not loop.first else \'\' }}<tool_call>\n{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The generation header is always there: after every chat, and in the second one at the end of every user's turn.
ALWAYS = (
    "{{ '<s>' }}{% for m in messages %}<|turn|>{{ m.role }}<|said|>{{ m.content }}<|over|>{% endfor %}"
    "<|turn|>assistant<|said|>"
)
USERS_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|><|im_start|>assistant\n"
    "{% elif m.role == 'system' %}<|im_start|>system\n{{ m.content }}<|im_end|>"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# No token begins every turn, and the header follows without being asked for.
TWO_OPENERS = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ m.content }}</s>{% endif %}{% endfor %}<A>"
)
# The last answer ends with another token than those before it.
LAST_ENDS = (
    "{% for m in messages %}<|turn|>{{ m.role }}<|said|>{{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' and loop.last and not add_generation_prompt else '<|over|>' }}{% endfor %}"
    + GENERATE
    + "<|turn|>assistant<|said|>{% endif %}"
)
# Lists of content parts are written without anything between them.
LISTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "dated": DATED,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "llama2": LLAMA2,
    "qwen": QWEN,
    "zephyr": ZEPHYR,
    "vicuna": VICUNA,
    "phi3": PHI3,
    "agent": AGENT,
    "always": ALWAYS,
    "users_header": USERS_HEADER,
    "two_openers": TWO_OPENERS,
    "last_ends": LAST_ENDS,
    "lists": LISTS,
}
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "dog"},
    {"role": "user", "content": "fox"},
]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return tokenizer


def _sentencepiece(scheme: str) -> Tokenizer:
    """The Llama and Mistral kind: spaces are a character, unknown ones are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    # A trainer makes its byte tokens added ones; in a real tokenizer they are vocabulary alone.
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    special = [text for text in CONTROLS if text not in MARKERS]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, rstrip="|user" in text) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKERS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    "bytes": _byte_level,
    "first": lambda: _sentencepiece("first"),
    "always": lambda: _sentencepiece("always"),
    "never": lambda: _sentencepiece("never"),
    "normalizer": lambda: _sentencepiece("normalizer"),
}
BOS_OF = {"llama3": "<|begin_of_text|>", "dated": "<|begin_of_text|>", "gemma": "<bos>", "chatml": "<|im_start|>"}


@dataclass
class Chat:
    tokenizer: Any
    encoder: PromptEncoder

    def texts(self, messages: list[dict]) -> list[tuple[str, bool]]:
        return [(self.text(s), s.bidirectional) for s in self.encoder.encode({"messages": messages})]

    def text(self, segment: Segment) -> str:
        return self.tokenizer.decode(segment.token_ids, skip_special_tokens=False)

    def ids(self, messages: list[dict]) -> list[int]:
        return ids_of(self.encoder.encode({"messages": messages}))

    def controls(self, messages: list[dict]) -> list[int]:
        control = set(self.tokenizer.get_added_vocab().values())
        return [token for token in self.ids(messages) if token in control]


def ids_of(segments: Sequence[Segment]) -> list[int]:
    return [token for segment in segments for token in segment.token_ids]


_TOKENIZERS: dict[tuple[str, str], PreTrainedTokenizerFast] = {}
_CHATS: dict[tuple, Chat] = {}


def chat(name: str, kind: str = "bytes", **options: object) -> Chat:
    key = (name, kind, repr(options))
    if key not in _CHATS:
        bos = BOS_OF.get(name, "<s>")
        tokenizer = _TOKENIZERS.setdefault((kind, bos), _wrap(KINDS[kind]()))
        tokenizer.bos_token = bos
        template = PromptTemplate(chat_template=TEMPLATES[name], **options)  # type: ignore[arg-type]
        _CHATS[key] = Chat(tokenizer, PromptEncoder(tokenizer, template, date=DATE))
    return _CHATS[key]


def expected_ids(name: str, case: Chat, messages: list[dict], **options: Any) -> list[int]:
    """What transformers gives for the whole rendered text, on the plan's date."""
    source = TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'03 Feb 2026'")
    options = {"add_generation_prompt": not options.get("continue_final_message")} | options
    rendered = case.tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    return case.tokenizer(rendered, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]
