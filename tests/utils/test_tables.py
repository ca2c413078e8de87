import sys

import pytest

from coaug_trl.utils.tables import Cell, Piece, Table, describe_marks, write


def test_rows_may_be_plain_texts_and_no_cell_ends_a_row():
    table = Table("", ["name", "value"], [["a|b\nc", "1"], [Cell("d", bold=True, superscript="a"), "2"]])
    assert table.rows[0] == [Cell("a|b\nc"), Cell("1")]
    assert table.markdown().splitlines() == [
        "| name | value |",
        "| --- | ---: |",
        r"| a\|b c | 1 |",
        "| **d**<sup>a</sup> | 2 |",
    ]
    assert r"\textbf{d}\textsuperscript{a} & 2 \\" in table.latex()
    assert str(table).splitlines()[-1].split() == ["dᵃ", "2"]


@pytest.mark.parametrize("format", ["table", "markdown", "latex"])
def test_a_table_without_rows_is_its_title(format):
    assert write(["50 is_fine", Table("Nothing", ["a"], [])], format).endswith("\n\nNothing")


def test_marked_words_stand_out_in_every_format(monkeypatch):
    pieces = [Piece("How to "), Piece("treat", "shared"), Piece(" it?")]
    table = Table("Title", ["", "text", "added"], [["a", Cell(pieces), Cell([])]], prose=2)
    assert "| a | How to **treat** it? |  |" in table.markdown()
    assert (
        r"a & How to \textbf{treat} it? &  \\" in table.latex()
        and r"{lp{0.36\linewidth}p{0.36\linewidth}}" in table.latex()
    )
    assert "  a  How to TREAT it?" in table.terminal() and "+" not in table.terminal()
    assert [describe_marks(format) for format in ("table", "markdown")] == ["in capitals", "bold"]
    for name, value in (("TERM", "xterm"), ("NO_COLOR", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[1;32mtreat\x1b[0m" in table.terminal() and describe_marks("table") == "marked"
