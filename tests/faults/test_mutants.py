"""The mutants fit the product's text, so that `make chaos` can make them."""

from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_one_place_and_its_tests_exist(mutant: Mutant):
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert mutant.applied(text) != text
    assert [name for name in mutant.tests.split() if not (ROOT / name).is_file()] == []
