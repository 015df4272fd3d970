"""Tests of mutants.py: is its list still about the code? (`python tests/mutants.py` tries it.)"""
import pytest
from mutants import MUTANTS, stale


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0]}: {m[1][:40]}")
def test_every_mutant_changes_exactly_one_place_of_the_code(mutant):
    file, old, new = mutant
    assert old != new and stale(file, old) is None
