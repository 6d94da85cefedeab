#!/usr/bin/env python3
"""Write tests/data/tokenizer_agreement.json.gz: texts and the ids that Hugging Face's tokenizer gives them.

    tools/make_tokenizer_fixture.py CHECKPOINT_FOLDER [-o FILE]

Needs transformers; the tests that read the file do not. Each entry is [text, ids as ordinary text, ids with control
tokens recognised, or null where those are the same]. The texts are sentences in many scripts, source code, emoji,
white space and spelled-out special tokens, and seeded mixtures of all these.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

SENTENCES = {
    "Latin": "The river is wide here, isn't it? We'll cross at 10:45, or I'd rather wait.",
    "Latin, accents": "Où était l'été? Größe, señal, čeština, żółć, İstanbul, smørrebrød, fjärran.",
    "Vietnamese": "Trời hôm nay đẹp quá, chúng ta đi dạo nhé.",
    "Greek": "Το ποτάμι είναι πλατύ, και το νερό κρύο σήμερα.",
    "Cyrillic": "Сегодня холодно, но мы всё-таки пойдём к реке. Її дім їде.",
    "Armenian": "Գետը լայն է, ջուրը՝ սառը։",
    "Georgian": "მდინარე ფართოა და წყალი ცივია.",
    "Hebrew": "הנהר רחב, והמים קרים. שָׁלוֹם",
    "Arabic": "النهر واسع والماء بارد اليوم. مَرْحَبًا ١٢٣",
    "Persian": "رودخانه پهن است و آب سرد می‌شود. ۴۵۶",
    "Devanagari": "नदी चौड़ी है और पानी ठंडा है। १२३",
    "Bengali": "নদীটি চওড়া এবং জল ঠান্ডা।",
    "Gurmukhi": "ਨਦੀ ਚੌੜੀ ਹੈ ਅਤੇ ਪਾਣੀ ਠੰਡਾ ਹੈ।",
    "Gujarati": "નદી પહોળી છે અને પાણી ઠંડું છે.",
    "Tamil": "ஆறு அகலமானது, தண்ணீர் குளிர்ச்சியாக உள்ளது.",
    "Telugu": "నది వెడల్పుగా ఉంది, నీరు చల్లగా ఉంది.",
    "Kannada": "ನದಿ ಅಗಲವಾಗಿದೆ, ನೀರು ತಣ್ಣಗಿದೆ.",
    "Malayalam": "പുഴ വീതിയുള്ളതാണ്, വെള്ളം തണുത്തതാണ്.",
    "Sinhala": "ගඟ පළලයි, වතුර සීතලයි.",
    "Thai": "แม่น้ำกว้างและน้ำเย็นมากวันนี้ ๑๒๓",
    "Lao": "ແມ່ນ້ຳກວ້າງ ແລະ ນ້ຳເຢັນ.",
    "Khmer": "ទន្លេធំទូលាយ ហើយទឹកត្រជាក់។",
    "Burmese": "မြစ်က ကျယ်ပြီး ရေက အေးတယ်။",
    "Tibetan": "གཙང་པོ་རྒྱ་ཆེན་པོ་རེད།",
    "Amharic": "ወንዙ ሰፊ ነው፣ ውሃውም ቀዝቃዛ ነው።",
    "Cherokee": "ᎣᏏᏲ, ᎡᏉᏂ ᎠᏯᏖᎾ.",
    "Chinese": "河很宽,今天的水很冷。我們明天再去吧!",
    "Japanese": "川は広くて、水は冷たいです。カタカナもABCも。ﾊﾝｶｸ",
    "Korean": "강은 넓고 물은 차갑습니다. 한국어 ㅋㅋ",
    "Mongolian": "ᠭᠣᠣᠯ ᠥᠷᠭᠡᠨ᠃ Гол өргөн.",
}
CODE = [
    "def f(x: int = 0) -> list[str]:\n    return [str(i) for i in range(x)]  # 100_000\n",
    '#include <stdio.h>\nint main(void) {\n\tprintf("%d\\n", 0x1F & ~3);\n\treturn 0;\n}\n',
    'fn main() { let v: Vec<u8> = vec![1, 2, 3]; println!("{:?}", v); }',
    "SELECT a.id, COUNT(*) FROM t AS a WHERE a.x >= 3.14e-10 GROUP BY 1;",
    '<div class="a b">&nbsp;<!-- note --></div>\r\n<p>text</p>\r\n',
    'for i in $(seq 1 9); do echo "$i" >> /tmp/out.txt 2>&1; done',
    '{"name": "tool", "arguments": {"path": "C:\\\\x", "n": [1, -2, 3.0e8, null]}}',
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$",
    "| a | b |\n|---|---:|\n| 1 | 22 |\n\n- [ ] item\n  * sub\n",
]
SYMBOLS = [
    "😀😃👍🏽👩‍👩‍👧‍👦🇩🇪🏳️‍🌈❤️‍🔥☺︎",
    "①②③ ½ ⅷ ² ℃ № ™",
    "e\u0301 a\u030a\u0323 \u1112\u1161\u11ab",
    "\u212b \u2126 ﬁ ﬃ",
    "→←∀∃∑≠≤⊂ ██▓▒░ ┌─┐ ♪♫",
    "a\u200bb\u200dc\u2060d\ufeffe\u00ad",
    "\u202eabc\u202c",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𓀀𓁐 𐍈",
    "\x00\x01\x7f\x85\u2028\u2029",
    "\ue000\uf8ff\U000f0000\U0010fffd\ufffd",
]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "   \t  ", "\u00a0", "\u3000", "\u2003 ", "\n\n\n   x", "\v\f"]
PUNCTUATION = [".", ",", "!?", "...", "—", "'s", "'LL", "’s", '"', "((", "}};", "://", "_", "-", "<|", "|>", "<", "</"]


def make_texts(control: list[str], count: int = 2600, seed: int = 0) -> list[str]:
    """`count` different texts, the same for the same seed."""
    rng = random.Random(seed)
    sources = [*SENTENCES.values(), *CODE, *SYMBOLS]
    texts = dict.fromkeys(["", *sources, *SPACES, *PUNCTUATION, *control])
    texts |= dict.fromkeys(map(_decomposed, sources))
    while len(texts) < count:
        pieces = [_piece(rng, sources, control) for _ in range(rng.randint(1, 5))]
        texts[rng.choice(["", "", " ", "\n"]).join(pieces)] = None
    return list(texts)


def _decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _piece(rng: random.Random, sources: list[str], control: list[str]) -> str:
    kind = rng.random()
    if kind < 0.6:
        text = rng.choice(sources)
        start = rng.randrange(len(text))
        text = text[start : start + rng.randint(1, 24)]
        changes: list[Callable[[str], str]] = [str, str, str.upper, str.title, _decomposed]
        return rng.choice(changes)(text)
    if kind < 0.7:
        return rng.choice(SPACES)
    if kind < 0.8:
        return rng.choice(PUNCTUATION)
    if kind < 0.87:
        return str(rng.randrange(10 ** rng.randint(1, 9)))
    if kind < 0.94:
        return rng.choice(control)
    return chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)]))


def without_control_tokens(folder: Path) -> PreTrainedTokenizerFast:
    """The same BPE with no added tokens at all: how Hugging Face encodes ordinary text."""
    from tokenizers import Tokenizer

    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**spec, "added_tokens": []})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds tokenizer.json and tokenizer_config.json")
    parser.add_argument("-o", "--output", type=Path, default=Path("tests/data/tokenizer_agreement.json.gz"))
    args = parser.parse_args()

    with_control = AutoTokenizer.from_pretrained(args.folder)
    plain = without_control_tokens(args.folder)
    entries = []
    for text in make_texts(sorted(with_control.get_added_vocab())):
        ids, control_ids = plain.encode(text), with_control.encode(text)
        entries.append([text, ids, None if ids == control_ids else control_ids])
    data = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    args.output.write_bytes(gzip.compress(data, compresslevel=9, mtime=0))
    print(f"{len(entries)} texts, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
