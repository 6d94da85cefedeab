"""Thinking and answer, told apart by token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import IM_END, THINK, THINK_END, build_tiny_tokenizer

from edgeq.text.channels import ChannelParser, ends_in_thinking
from edgeq.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny")
    build_tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def read(tokenizer: Tokenizer, prompt: str, generated: str) -> dict[str, str]:
    """The text of each channel after streaming `generated`."""
    parser = ChannelParser(tokenizer, tokenizer.encode(prompt, control=True))
    ids = tokenizer.encode(generated, control=True)
    pieces = [parser.push(token) for token in ids]
    assert [piece.token for piece in pieces] == ids
    pieces.append(parser.flush())
    channels = {"thinking": "", "answer": ""}
    for piece in pieces:
        channels[piece.channel] += piece.text
    return channels


OPEN = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("prompt", "generated", "thinking", "answer"),
    [
        (OPEN, "let me see\n</think>\n\nYes.<|im_end|>", "let me see", "Yes."),
        (OPEN, "\na\n\nb\n\n</think>\n\n\nYes\n\n", "a\n\nb", "Yes\n\n"),
        (OPEN, "</think>Yes", "", "Yes"),
        (OPEN, "never closed\n", "never closed", ""),
        (CLOSED, "\nYes\n", "", "Yes\n"),
        (CLOSED, "Yes <think>\nwait\n</think>\n\nno", "wait", "Yes no"),
        (OPEN, "a\n</think>\n\nb</think>\nc", "a", "b\nc"),
        ("", "<think>\nhm 😀\n</think>\n\nöä", "hm 😀", "öä"),
        ("plain text", "<tool_call>\nx</tool_call>", "", "<tool_call>\nx</tool_call>"),
    ],
)
def test_channels(tokenizer: Tokenizer, prompt: str, generated: str, thinking: str, answer: str) -> None:
    assert read(tokenizer, prompt, generated) == {"thinking": thinking, "answer": answer}


def test_letters_are_not_tokens(tokenizer: Tokenizer) -> None:
    parser = ChannelParser(tokenizer)
    text = "".join(parser.push(token).text for token in tokenizer.encode("<think>a</think>"))
    assert text == "<think>a</think>"
    assert not parser.in_thinking


def test_state_follows_the_tokens(tokenizer: Tokenizer) -> None:
    parser = ChannelParser(tokenizer)
    assert (parser.think_open_id, parser.think_close_id) == (THINK, THINK_END)
    assert (parser.in_thinking, parser.channel) == (False, "answer")
    parser.push(THINK)
    assert (parser.in_thinking, parser.channel) == (True, "thinking")
    parser.push(THINK_END)
    assert (parser.in_thinking, parser.channel) == (False, "answer")


def test_half_a_character_at_the_switch_belongs_to_the_thinking(tokenizer: Tokenizer) -> None:
    parser = ChannelParser(tokenizer, [THINK])
    parser.push(tokenizer.encode("😀")[0])
    assert parser.push(THINK_END) == ("thinking", "\ufffd", THINK_END)


def test_start_is_that_of_the_last_turn(tokenizer: Tokenizer) -> None:
    assert ends_in_thinking([THINK, 5], tokenizer)
    assert not ends_in_thinking([THINK, THINK_END], tokenizer)
    assert not ends_in_thinking([THINK, IM_END, 5], tokenizer)
    assert not ends_in_thinking([], tokenizer)


@given(thinking=st.text(), answer=st.text())
def test_any_thinking_and_answer_come_back(tokenizer: Tokenizer, thinking: str, answer: str) -> None:
    ids = [*tokenizer.encode(thinking), THINK_END, *tokenizer.encode(answer), IM_END]
    parser = ChannelParser(tokenizer, [THINK])
    pieces = [parser.push(token) for token in ids] + [parser.flush()]
    texts = {
        channel: "".join(piece.text for piece in pieces if piece.channel == channel)
        for channel in ("thinking", "answer")
    }
    assert texts["thinking"] == tokenizer.decode(tokenizer.encode(thinking)).strip("\n")
    assert texts["answer"] == tokenizer.decode(tokenizer.encode(answer)).lstrip("\n")
