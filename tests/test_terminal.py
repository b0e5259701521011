"""The picture of a terminal shows what is left on its screen."""

import pytest

from scripts import terminal


@pytest.mark.parametrize(
    ("printed", "left"),
    [
        ("one\ntwo\n", "one\ntwo"),
        ("packing 1\rpacking 2\rpacked\n", "packed"),
        ("\x1b[?25lat ━━━ 1/9\r\x1b[2Kat ━━━ 2/9\r\x1b[2Kconverged\nat ━━━ 2/9\n\x1b[?25hdone\n", "converged\ndone"),
        ("\x1b[1mbold\x1b[0m, \x1b[2mdim\x1b[0m\r\n", "\x1b[1mbold\x1b[0m, \x1b[2mdim\x1b[0m"),
    ],
)  # fmt: skip
def test_erased_and_overwritten_text_is_gone(printed, left):
    assert terminal.screen(printed) == left


def test_the_picture_loads_no_font():
    svg = '<style>@font-face { src: url("https://host/font.woff2"); }\n.text { fill: red }</style>'
    assert terminal.without_downloads(svg) == "<style>.text { fill: red }</style>"
