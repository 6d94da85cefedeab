"""A byte-level BPE tokenizer of 1,057 tokens with the family's special tokens and a small chat template.

Laid out like the real one: special tokens follow the BPE tokens in the same order, the last seven are listed in
tokenizer_config.json only. The ids fit a tiny model with 1,024 BPE tokens and up to 31 rows of padding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BPE_TOKENS = 1024
IM_START, IM_END, END_OF_TEXT = BPE_TOKENS + 1, BPE_TOKENS + 2, BPE_TOKENS
THINK, THINK_END = BPE_TOKENS + 24, BPE_TOKENS + 25
VOCAB_SIZE = BPE_TOKENS + 33


def _words(text: str) -> list[str]:
    return text.split()


SPECIAL = _words("""
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
""")
NOT_SPECIAL = _words("""
<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
<tool_response> </tool_response> <think> </think>
""")
CONFIG_ONLY = _words("""
<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|>
""")

# Merges are made of these words, so that ordinary sentences have tokens of several lengths. The words of other
# scripts also make tokens that end in the middle of a character.
WORDS = _words("""
the of and to in is that for it was on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know get through back much before go
good new write our me man too any day same right look think also around another came come work three word must because
does part even place well such here take why things help put years different away again off went old number great tell
men say small every found still between name should home big give air line set own under read last never us left end
along while might next sound below saw something thought both few those always looked show large often together asked
house world going want school important until form food keep children feet land side without boy once animals enough
took sometimes four head above kind began almost live page got earth need far hand high year mother light parts
question answer hello system user assistant model token return function value string number integer
class import print für
über größe naïve café señor año été garçon мир слово привет вода 中文 你好 世界 日本語 テスト مرحبا שלום नमस्ते 안녕 😀
""")

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {%- if messages[0].role == 'system' %}
        {{- '\\n\\n' + messages[0].content | trim }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content | trim + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if ns.last_query < 0 %}
    {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content | trim %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query %}
            {{- '<think>\\n' + message.reasoning_content | default('') | trim + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if not enable_thinking %}
        {{- '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tiny_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_spec(), ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def link_real_tokenizer(folder: Path, size: str = "0.8b") -> None:
    """Put the hub's tokenizer files of a model size into `folder`; skips the test where they are not at hand."""
    shared = Path(__file__).resolve().parents[2] / "shared"
    if not (shared / "assets" / "tokenizer.json").is_file():
        pytest.skip("needs the real tokenizer in ../shared")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").symlink_to(shared / "assets" / "tokenizer.json")
    for name in ("tokenizer_config.json", "chat_template.jinja", "config.json"):
        (folder / name).symlink_to(shared / "qwen3.5" / size / name)


def tokenizer_spec() -> dict[str, Any]:
    """The contents of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    vocab, merges = _bpe()
    added = [_added(text, special=text in SPECIAL) for text in SPECIAL + NOT_SPECIAL]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": BPE_TOKENS + n, **token} for n, token in enumerate(added)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def tokenizer_config() -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    added = [_added(text, special=text not in NOT_SPECIAL) for text in SPECIAL + NOT_SPECIAL + CONFIG_ONLY]
    return {
        "added_tokens_decoder": {str(BPE_TOKENS + n): token for n, token in enumerate(added)},
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _added(text: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": text, **flags, "special": special}


def _bpe() -> tuple[dict[str, int], list[str]]:
    """256 bytes, then the prefixes of the words (with a space before them), each merged from the one before it."""
    letters = _byte_letters()
    tokens = sorted(letters)
    merges = []
    for text in (prefix + word for prefix in (" ", "") for word in WORDS):
        spelled = "".join(letters[byte] for byte in text.encode())
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in tokens and len(tokens) < BPE_TOKENS:
                tokens.append(spelled[:end])
                merges.append(f"{spelled[: end - 1]} {spelled[end - 1]}")
    assert len(tokens) == BPE_TOKENS, len(tokens)
    return {token: n for n, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """The character that byte-level BPE writes for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
