"""Tokenizer and chat template of the demo: the family's pre-tokenizer and control tokens, a small BPE of its own."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .architecture import CONTROL_TOKENS, Shape

FAMILY = Path(__file__).parent / "family"  # tokenizer_config.json and chat_template.jinja of the 0.8B model


def train_tokenizer(texts: list[str], s: Shape) -> Tokenizer:
    """Byte-level BPE of exactly `s.base_vocab` tokens on the texts, plus the control tokens in the family's order."""
    config = json.loads((FAMILY / "tokenizer_config.json").read_text())
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(config["pretokenize_regex"]), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    # Not in the stubs, but in the file that it writes.
    tok.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)  # type: ignore[call-arg]
    tok.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=s.base_vocab, initial_alphabet=alphabet, show_progress=False)
    )
    if tok.get_vocab_size() != s.base_vocab:
        raise SystemExit(f"the training text yields only {tok.get_vocab_size()} tokens, {s.base_vocab} are needed")
    tok.add_tokens(
        [AddedToken(**{k: t[k] for k in t if k != "special"}, special=t["special"]) for t in family_tokens()]
    )
    return tok


def family_tokens() -> list[dict[str, Any]]:
    """The control tokens in order of id, as tokenizer_config.json describes them."""
    added = json.loads((FAMILY / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert len(added) == CONTROL_TOKENS
    return [added[i] for i in sorted(added, key=int)]


def write_tokenizer(tok: Tokenizer, s: Shape, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tok.save(str(out / "tokenizer.json"))
    config = json.loads((FAMILY / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(s.control(i)): t for i, t in enumerate(family_tokens())}
    config["model_max_length"] = 32768
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    (out / "chat_template.jinja").write_text((FAMILY / "chat_template.jinja").read_text())


@cache
def _template() -> Template:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    env.globals["raise_exception"] = _refuse
    return env.from_string((FAMILY / "chat_template.jinja").read_text())


def _refuse(message: str) -> None:
    raise ValueError(message)


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool, prompt: bool = False) -> str:
    """The conversation as the family's template prints it; with `prompt`, ready for the next assistant turn."""
    return _template().render(
        messages=messages, tools=tools or None, enable_thinking=thinking, add_generation_prompt=prompt
    )


# What the model writes itself: everything after the generation prompt, up to and including the end of the turn.
ANSWER = re.compile(r"<\|im_start\|>assistant\n(?:<think>\n(?:\n</think>\n\n)?)?(.*?<\|im_end\|>)", re.DOTALL)


def answer_spans(text: str) -> list[tuple[int, int]]:
    return [m.span(1) for m in ANSWER.finditer(text)]
