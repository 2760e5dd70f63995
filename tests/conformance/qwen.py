"""The Qwen2.5 tokenizer, rebuilt from its published BPE ranks, and its folder in the published layout."""

import base64
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import dashscope
import tokenizers

from wallaroo.model.tokenizer import QWEN_TOKENS, add_control_tokens, build


@cache
def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id and merges by rank, in the byte alphabet of `vocab.json`."""
    file = Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"
    ranks = {}
    for line in file.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append((spell(left), spell(right)))
    return {spell(token): rank for token, rank in ranks.items()}, merges


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that BPE joins last to make the token: what earlier ranks alone leave of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = pairs.index(min(pairs))
        assert pairs[at] < ranks[token], f"{token!r} has no unique last merge"
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@cache
def qwen_tokenizer_json() -> str:
    """`tokenizer.json` as Qwen2.5 has it: the ranks and the 22 added tokens."""
    tokenizer = build(*vocabulary_and_merges())
    add_control_tokens(tokenizer, QWEN_TOKENS)
    return tokenizer.to_str()


def write_slow_tokenizer(folder: Path) -> None:
    """The older form of the same tokenizer: `vocab.json` and `merges.txt`."""
    vocabulary, merges = vocabulary_and_merges()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def with_tokens(text: str, tokens: list[str]) -> str:
    """A `tokenizer.json` with control tokens added."""
    tokenizer = tokenizers.Tokenizer.from_str(text)
    add_control_tokens(tokenizer, tokens)
    return tokenizer.to_str()
