import pytest

from common.printable import printable


@pytest.mark.parametrize("text, shown", [
    ("photos/IMG 1.jpg", "photos/IMG 1.jpg"),
    ("日本語 ünï.png", "日本語 ünï.png"),                                      # letters stay letters
    ("a\nb\r\t.png", r"a\nb\r\t.png"),
    ("\x1b[2J\x1b]0;owned\x07.png", r"\x1b[2J\x1b]0;owned\x07.png"),          # would clear the screen, name the window
    ("photo\u202egnp.exe", r"photo\u202egnp.exe"),                            # would be read backwards
    ("caf\udce9.png", r"caf\udce9.png"),                                      # a byte that is no UTF-8
    ("\x9b31m\u2028\ufeff", r"\x9b31m\u2028\ufeff"),
    ("<script>alert(1)</script>", "<script>alert(1)</script>"),               # means nothing to a terminal
])
def test_what_a_terminal_would_act_on_is_shown_as_its_escape(text, shown):
    assert printable(text) == shown
    print(printable(text).encode())                                           # what a strict terminal can take


def test_long_text_is_cut():
    assert printable("x" * 10, 4) == "xxxx..."
