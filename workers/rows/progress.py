"""A bar that shows how many rows of a call have finished. Knows tqdm, which transformers installs; no rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], Any]  # what is told how many rows have just finished
UseTqdm = bool | Callable[..., Any]  # whether, or what to call in place of tqdm


def no_bar(num_rows: int) -> None:
    """Shows nothing."""


@contextmanager
def progress_bar(use_tqdm: UseTqdm, num_rows: int) -> Iterator[Advance]:
    if not use_tqdm:
        yield no_bar
        return
    from tqdm.auto import tqdm

    make = use_tqdm if callable(use_tqdm) else tqdm
    with make(total=num_rows, desc="Processed prompts", dynamic_ncols=True) as bar:
        yield bar.update
