"""Where replies appear: words wrap, nothing acts on the terminal, and what is piped is untouched."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.cli.console import show_json
from edgeq.cli.page import Wrapped, cells, page_on

WORDS = st.text(st.sampled_from("ab日本。（🙂é\u0301\u200d\ufe0f -\t\n\r\x1b`"), max_size=60)


class Screen(io.StringIO):
    """A terminal, as far as a page asks."""

    def isatty(self) -> bool:
        return True


def shown(text: str, columns: int = 20, size: int = 1000) -> str:
    """`text` on a terminal, written in pieces of `size` characters."""
    page = Wrapped(screen := Screen(), lambda: columns, lambda text: text)
    for start in range(0, len(text), size):
        page.write(text[start : start + size])
    page.end("")
    return screen.getvalue()


class TestWrapping:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("the quick brown fox jumps over", "the quick brown fox\njumps over"),
            ("twenty characters it\nis", "twenty characters it\nis"),
            ("twenty characters it is", "twenty characters it\nis"),
            ("a   b", "a   b"),
            ("end.  \nnext", "end.  \nnext"),
            ("  indented words go here too", "  indented words go\nhere too"),
            ("https://example.org/a/very/long/address is whole", "https://example.org/a/very/long/address\nis whole"),
            ("see https://example.org/a/very/long/address", "see\nhttps://example.org/a/very/long/address"),
            ("日本語日本語日本語日本語", "日本語日本語日本語日\n本語"),
            ("日本語日本語日本語日。", "日本語日本語日本語\n日。"),
            ("日本語日本語日本語（日", "日本語日本語日本語\n（日"),
            ("word 日本語日本語日本語", "word 日本語日本語日\n本語"),
            ("cafe\u0301 " * 5, "cafe\u0301 cafe\u0301 cafe\u0301 cafe\u0301\ncafe\u0301"),
            ("one two three four👩‍👩‍👧 five", "one two three four\n👩‍👩‍👧 five"),
            (
                f"```\n{'one two ' * 4}\n```\n{'one two ' * 4}",
                f"```\n{'one two ' * 4}\n```\n{'one two ' * 2}one\ntwo one two",
            ),
            ("``` is a fence, as ```x``` and others", "``` is a fence, as ```x``` and others"),
            ("```x``` is no fence, as others", "```x``` is no fence,\nas others"),
            ("tab\tand\tmore\tand", "tab\tand\tmore\nand"),
            ("", ""),
            ("\n\n", "\n\n"),
        ],
    )  # fmt: skip
    def test_lines(self, text: str, expected: str) -> None:
        for size in (1, 3, 1000):
            assert shown(text, size=size) == expected

    @given(WORDS, st.integers(1, 12), st.integers(1, 30))
    def test_nothing_is_lost_and_pieces_do_not_matter(self, text: str, size: int, columns: int) -> None:
        whole = shown(text, columns)
        assert whole == shown(text, columns, size)
        visible = text.replace("\r\n", "\n").replace("\r", r"\x0d").replace("\x1b", r"\x1b")
        assert "".join(whole.split()) == "".join(visible.split())

    @given(st.text(st.sampled_from("ab日🙂 "), max_size=80))
    def test_no_line_is_too_long(self, text: str) -> None:
        words = max(map(cells, text.replace("日", "日 ").replace("🙂", "🙂 ").split()), default=0)
        if words <= 20:
            assert all(cells(line) <= 20 for line in shown(text).split("\n"))

    def test_without_a_width(self) -> None:
        assert shown("the quick brown fox jumps over", 0) == "the quick brown fox jumps over"

    def test_a_window_that_is_resized(self) -> None:
        width = 20
        page = Wrapped(screen := Screen(), lambda: width, lambda text: text)
        page.write("one two three four five ")
        width = 8
        page.write("six seven eight nine ten")
        page.end("")
        assert screen.getvalue() == "one two three four\nfive six\nseven\neight\nnine ten"


class TestControls:
    def test_they_are_shown(self) -> None:
        text = "a\x1b[2J\x07\x00\x7f\x9b31m\x85b\rc\r\nd\te"
        assert shown(text, 99) == r"a\x1b[2J\x07\x00\x7f\x9b31m\x85b\x0dc" + "\nd\te"

    def test_split_between_pieces(self) -> None:
        assert shown("a\r\nb\rc\r", 99, 1) == "a\nb" + r"\x0dc\x0d"

    def test_a_pipe_gets_the_bytes(self) -> None:
        page = page_on(stream := io.StringIO(), wrap=True, markdown=True, style=lambda text: f"<{text}>")
        text = "a\x1b[2J\r\n" + "word " * 99
        page.write(text)
        page.end("")
        assert stream.getvalue() == text

    def test_json_is_valid_and_harmless(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdout", stream := io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        show_json({"a\x9b": "\x1b\x7f\x85世"})
        stream.seek(0)
        assert stream.read() == '{"a\\u009b": "\\u001b\\u007f\\u0085世"}\n'


class TestMarkdown:
    def rendered(self, text: str, size: int = 7) -> str:
        page = page_on(screen := Screen(), markdown=True)
        for start in range(0, len(text), size):
            page.write(text[start : start + size])
        page.end()
        return re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())

    def test_blocks(self) -> None:
        out = self.rendered("# Title\n\nSome *words*.\n\n* one\n* two\n\n```py\nx = 1\n\ny = 2\n```\nEnd.")
        for word in ("Title", "words", "• one", "x = 1", "y = 2", "End."):
            assert word in out
        assert "```" not in out
        assert "*words*" not in out

    def test_what_looks_like_html_is_text(self) -> None:
        assert "List<int>" in self.rendered("A List<int> and <b>bold</b>.")
        assert "<b>bold</b>" in self.rendered("A List<int> and <b>bold</b>.")

    def test_an_unfinished_fence_is_shown(self) -> None:
        assert "x = 1" in self.rendered("```py\nx = 1")

    def test_controls(self) -> None:
        assert "\x1b]0;" not in self.rendered("a \x1b]0;title\x07 [l\x1b](http://\x9b)")

    def test_a_second_text(self) -> None:
        page = page_on(screen := Screen(), markdown=True)
        for text in ("one", "two"):
            page.write(text)
            page.end()
        assert screen.getvalue().split() == ["one", "two"]
