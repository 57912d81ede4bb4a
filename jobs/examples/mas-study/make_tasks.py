"""The study's data: tasks in which the order of a prompt's parts matters, and four of the paper's own.

    lookup    six names with colours, six colours with numbers: which number does a name have, by its colour?
    word      a sentence of a real exam question, and which of four words occurs in it
    paper     ARC-Easy, ARC-Challenge, OpenBookQA and BoolQ as the paper's authors train on them, in one

`lookup` and `word` are small enough for a small model to learn, and come in two orders. If the numbers stand before the
names, a causal model can put both hops together while it reads; if they stand after them, all is left to the last
tokens. If the question stands before the sentence, the sentence is read with it in mind. A third form has the prompt
twice ("prompt repetition"), for the arm that gives a causal model a second look. Knows texts; nothing of models or
jobs.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

NUM_TRAIN, NUM_TEST = 2112, 1000
ORDERS = {"lookup": ("numbers_first", "numbers_last"), "word": ("question_first", "question_last")}
NAMES = (
    "Ada", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Ned", "Olga",
    "Paul", "Rosa", "Sam", "Tina", "Ulf", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "gray", "gold", "silver", "purple", "orange")
NUM_PAIRS = 6  # with eight, no arm learns anything in this number of steps
LETTERS = "ABCD"
KINDS = ("easy", "challenge")
PAPER_TASKS = ("arc_easy", "arc_challenge", "openbookqa", "boolq")
NUM_PAPER_TRAIN, NUM_PAPER_TEST = 480, 300  # of each of the four tasks, or all items if there are fewer
AS_PUBLISHED = "as_published"  # the paper's tasks have one order


@dataclass(frozen=True, slots=True)
class Item:
    """One question: the parts of its prompt in the first order of its task, and the possible answers."""

    parts: tuple[str, ...]
    swapped: tuple[str, ...]  # in the second order
    choices: tuple[str, ...]
    label: int


def lookup_items(seed: str, count: int) -> Iterator[Item]:
    """Every item has its own tables, with random names, colours and numbers."""
    random = Random(f"lookup/{seed}")
    for _ in range(count):
        names, colours = random.sample(NAMES, NUM_PAIRS), random.sample(COLOURS, NUM_PAIRS)
        numbers = random.sample("123456789", NUM_PAIRS)
        order = random.sample(range(NUM_PAIRS), NUM_PAIRS)
        label = random.randrange(NUM_PAIRS)
        by_name = ", ".join(f"{name} {colour}" for name, colour in zip(names, colours, strict=True))
        by_colour = ", ".join(f"{colours[place]} {numbers[place]}" for place in order)
        first, second = f"Numbers: {by_colour}.", f"Names: {by_name}."
        question = f"Which number has {names[label]}?"
        yield Item((first, second, question), (second, first, question), tuple(numbers), label)


def word_items(seed: str, count: int, sentences: Sequence[str], vocabulary: Sequence[str]) -> Iterator[Item]:
    """Wrong choices are drawn from `vocabulary`. If there are fewer sentences than items, sentences are used again."""
    random = Random(f"word/{seed}")
    rounds = -(-count // len(sentences))
    drawn = [sentence for _ in range(rounds) for sentence in random.sample(list(sentences), len(sentences))]
    for sentence in drawn[:count]:
        own = sorted(set(words_of(sentence)))
        right = random.choice(own)
        wrong = random.sample([word for word in vocabulary if word not in own], 3)
        options = random.sample([right, *wrong], 4)
        label = options.index(right)
        listed = " ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, options, strict=True))
        text, question = f"Sentence: {sentence}", f"Which word is in the sentence? {listed}"
        yield Item((question, text), (text, question), tuple(LETTERS), label)


def words_of(sentence: str) -> list[str]:
    """Words of five letters or more, which are seldom function words."""
    return re.findall(r"[a-z]{5,}", sentence.lower())


def sentences_in(files: Sequence[Path]) -> list[str]:
    """ARC's questions of 8 to 30 words, in LLM-Adapters' format, each once."""
    found: dict[str, None] = {}
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["instruction"]
            question = text.partition("\n\nAnswer1")[0].partition("question: ")[2].strip().replace("\n", " ")
            if 8 <= len(question.split()) <= 30 and len(set(words_of(question))) >= 3:
                found.setdefault(question)
    return list(found)


def paper_rows(lines: Sequence[str], count: int, name: str) -> list[dict[str, object]]:
    """Some lines of a file in LLM-Adapters' format. The choices are all answers that the text offers."""
    rows = []
    for line in Random(f"paper/{name}").sample(list(lines), min(count, len(lines))):
        given = json.loads(line)
        offered = given["instruction"].rpartition("Answer format: ")[2].split("/")
        rows.append(
            {
                "kind": name,
                "instruction": given["instruction"],
                "output": given["output"],
                "answer": given["answer"],
                "choices": [f"the correct answer is {answer}" for answer in offered],
                "label": offered.index(given["answer"]),
            }
        )
    return rows


def write_tasks(data: Path | None, folder: Path) -> dict[str, tuple[str, ...]]:
    """Write `TASK/ORDER/{train,test}.parquet`. Returns the orders of each task. Without `data`, only `lookup`."""
    items = {"lookup": {part: list(lookup_items(part, count)) for part, count in _COUNTS.items()}}
    if data is not None:
        by_part = {part: sentences_in([data / f"arc_{kind}-{part}.jsonl" for kind in KINDS]) for part in _COUNTS}
        vocabulary = sorted({word for sentence in by_part["train"] for word in words_of(sentence)})
        items["word"] = {
            part: list(word_items(part, count, by_part[part], vocabulary)) for part, count in _COUNTS.items()
        }
        for part, count in (("train", NUM_PAPER_TRAIN), ("test", NUM_PAPER_TEST)):
            files = {name: (data / f"{name}-{part}.jsonl").read_text(encoding="utf-8") for name in PAPER_TASKS}
            rows = [row for name, text in files.items() for row in paper_rows(text.splitlines(), count, name)]
            _write(folder / "paper" / AS_PUBLISHED / f"{part}.parquet", rows)
    for task, parts in items.items():
        for number, order in enumerate(ORDERS[task]):
            for part, made in parts.items():
                rows = [_row(item, (item.parts, item.swapped)[number]) for item in made]
                _write(folder / task / order / f"{part}.parquet", rows)
    orders: dict[str, tuple[str, ...]] = {task: ORDERS[task] for task in items}
    return orders if data is None else orders | {"paper": (AS_PUBLISHED,)}


_COUNTS = {"train": NUM_TRAIN, "test": NUM_TEST}


def _row(item: Item, parts: tuple[str, ...]) -> dict[str, object]:
    prompt = "\n".join(parts)
    return {
        "prompt": prompt,
        "prompt_twice": f"{prompt}\n\n{prompt}",
        "output": item.choices[item.label],
        "choices": item.choices,
        "label": item.label,
    }


def _write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, compression="zstd")
