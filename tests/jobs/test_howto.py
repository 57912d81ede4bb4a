"""The how-to pages, run as they are written: files, commands, and what they print.

Knows a page's form: a line that ends in `NAME`: before the block with a file's content, commands in sh, and after them
in a text block lines that must be among what they print, or begin so if they end in dots.
"""

import re
import shlex
from pathlib import Path

import pytest
from commands import segue

from segue.jobs.commands.reference import errors, reference
from segue.pipeline.jobfile.json_schema import comments_of, nested_models
from segue.pipeline.jobfile.training import FinetuneConfig

PAGES = Path(__file__).parents[2] / "jobs" / "howto"
WITHOUT_COMMANDS = {"README.md", "reference.md", "errors.md"}
_FILE = re.compile(r"^`([\w.-]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def page_names() -> list[str]:
    return sorted(path.name for path in PAGES.glob("*.md") if path.name not in WITHOUT_COMMANDS)


def as_words(text: str) -> str:
    """Tables are as wide as their terminal."""
    return " ".join(text.split())


def printed_by(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that the page's commands print, in its own folder."""
    for name, content in _FILE.findall(page):
        (folder / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(folder)
    printed = ""
    for kind, block in _BLOCK.findall(page):
        for line in block.splitlines() if kind == "sh" else ():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "segue"
            code, out, err = segue(*arguments)
            assert code == 0, (line, err)
            printed += out + err
    return printed


@pytest.mark.commands
@pytest.mark.parametrize("name", page_names())
def test_page_does_what_it_says(name, tmp_path, monkeypatch):
    page = (PAGES / name).read_text(encoding="utf-8")
    told = [line for kind, block in _BLOCK.findall(page) if kind == "text" for line in block.splitlines()]
    assert told
    printed = as_words(printed_by(page, tmp_path, monkeypatch))
    assert [line for line in told if as_words(line.removesuffix("...")) not in printed] == []


def test_every_page_is_in_the_list_and_every_link_leads_somewhere():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    for path in PAGES.glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (PAGES / link).exists(), (path.name, link)


@pytest.mark.parametrize(("name", "made"), [("reference.md", reference), ("errors.md", errors)])
def test_pages_made_of_the_code_are_up_to_date(name, made):
    assert (PAGES / name).read_text(encoding="utf-8") == made(), "run python -m segue.jobs.commands.reference"


@pytest.mark.parametrize("model", nested_models(FinetuneConfig), ids=lambda model: model.__name__)
def test_every_key_says_what_it_means(model):
    assert [name for name in model.model_fields if not comments_of(model).get(name)] == []
