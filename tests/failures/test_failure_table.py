"""docs/reliability.md has a row for each test of a failure, and no other."""

from failure_table import committed, marked


def test_the_page_has_a_row_for_each_test_of_a_failure():
    assert len(set(marked())) == len(marked()) > 20
    assert [row.what for row in committed()] == marked()
