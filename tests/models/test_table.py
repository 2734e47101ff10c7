"""The page about models shows the table that the verifier makes."""

from __future__ import annotations

import pytest

from tests.models.table import PAGE, table, written


@pytest.mark.real
def test_the_table_of_architectures_is_what_the_verifier_finds() -> None:
    page = PAGE.read_text()
    assert page == written(page, table()), "run: python -m tests.models.table"
