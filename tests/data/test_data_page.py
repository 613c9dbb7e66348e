"""The tables of docs/data.md are made by the code."""

from irlfast.data.conventions import CONVENTIONS
from tests.helpers.data_page import PAGE, page_with_tables, read_conventions, template_table


def test_the_tables_on_the_page_are_output_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page_with_tables(text), "python -m tests.helpers.data_page writes them anew"


def test_every_convention_has_a_row_on_the_page():
    assert read_conventions() == {convention.name for convention in CONVENTIONS}


def test_no_template_is_trained_on_ids_that_it_does_not_write():
    assert "another" not in template_table()
