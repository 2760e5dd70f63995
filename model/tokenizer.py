"""Text to token ids and back, by the checkpoint's own byte-level BPE.

Control tokens come only from `Control` pieces; the same words inside a user's prompt stay ordinary
text. Knows nothing of prompts, templates or tensors.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from wallaroo.model.config import SIZES_512
from wallaroo.model.errors import InputError, RowError, did_you_mean

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""The added tokens of Qwen2.5, in the order of their ids."""

WALLAROO_TOKENS = (
    "<|generate_start|>",
    "<|generate_end|>",
    "<|pixel_start|>",
    "<|pixel_end|>",
    "<|end_of_line>|",  # spelt so in the published vocabulary
    "<|generate_image_pad|>",
)
"""What Wallaroo adds to them, in the order of their ids."""

SIDES_512 = (352, 640, 384, 672, 704, 416, 608, 576, 448, 480, 544, 512)
"""The order in which the published model numbers the size indicators of its table, in pixels."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's rule for cutting text into words before BPE: a digit each, a word with the sign before it."""


class Control(str):
    """A control token inside a list of pieces: stands for one id, never for text."""

    __slots__ = ()


def indicator(side: int) -> str:
    """The size indicator of a side in pixels."""
    return f"<indicator:{side}>"


def added_tokens(sizes: dict[str, tuple[int, int]], indicators: str = "added") -> list[str]:
    """All control tokens of a checkpoint, in the order of their ids.

    Args:
        sizes: Ratio -> (height, width) in pixels.
        indicators: `text` leaves the size indicators out.

    Returns:
        The text of each token.
    """
    tokens = [*QWEN_TOKENS, *WALLAROO_TOKENS]
    if indicators == "added":
        sides = (
            SIDES_512 if sizes == SIZES_512 else sorted({side for size in sizes.values() for side in size})
        )
        tokens += [indicator(side) for side in sides]
    return tokens


def build(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's normalisation and splitting, without added tokens.

    Args:
        vocabulary: Token -> id, in the byte alphabet of `vocab.json`.
        merges: Pairs by rank, in the same alphabet.

    Returns:
        The tokenizer.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def add_control_tokens(tokenizer: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Adds control tokens, and keeps those that exist already.

    Args:
        tokenizer: Changed in place.
        tokens: Texts in the order of their ids.

    Raises:
        InputError: The vocabulary then holds another added token, or numbers them otherwise.
    """
    tokenizer.add_tokens([token for token in tokens if tokenizer.token_to_id(token) is None])
    found = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    if found != list(tokens):
        wrong = next((token for token in found if token not in tokens), None)
        problem = (
            f"holds the added token '{wrong}', which Qwen2.5 does not have"
            if wrong
            else "numbers its added tokens in another order than Qwen2.5"
        )
        raise InputError(f"The tokenizer {problem}; give the folder of a Qwen2.5-VL model as published.")


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        text: Contents of `tokenizer.json`.
        where: The file, for messages.

    Attributes:
        token_ids: Text of a control token -> its id.
        size: One more than the highest id.
    """

    def __init__(self, text: str, where: str = "tokenizer.json"):
        """text: the contents of a `tokenizer.json`. Raises InputError if it is not one."""
        try:
            values: dict[str, Any] = json.loads(text)
            self.token_ids: dict[str, int] = {
                token["content"]: int(token["id"]) for token in values.get("added_tokens", [])
            }
            # Without its added tokens this tokenizer cannot see a control token in a user's prompt.
            values["added_tokens"] = []
            _check_rules(values)
            values["post_processor"] = values["truncation"] = values["padding"] = None
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(values))
        except InputError as error:
            raise InputError(f"{where} {error}") from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(f"{where} is not a tokenizer of Hugging Face's `tokenizers`: {error}.") from None
        self._controls = frozenset(self.token_ids.values())
        highest = max(self._plain.get_vocab(with_added_tokens=False).values(), default=-1)
        self.size: int = 1 + max(highest, *self._controls, -1)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads the `tokenizer.json` of a folder.

        Raises:
            InputError: It is absent or broken.
        """
        file = Path(path) / "tokenizer.json"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read ({error}); a checkpoint needs it.") from None
        return cls(text, str(file))

    def encode(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of the pieces put together.

        Args:
            pieces: A `Control` gives its one id; neighbouring plain strings are joined and encoded as one
                text.

        Returns:
            Token ids, `(n,)`.

        Raises:
            InputError: A control token is unknown.
            RowError: Kind `prompt`: the text is not valid Unicode.
        """
        ids: list[int] = []
        text: list[str] = []
        for piece in pieces:
            if isinstance(piece, Control):
                ids += self._encode_text("".join(text))
                text = []
                ids.append(self.control_id(piece))
            else:
                text.append(piece)
        return ids + self._encode_text("".join(text))

    def control_id(self, token: str) -> int:
        """The id of a control token.

        Raises:
            InputError: The vocabulary has no such token.
        """
        if token not in self.token_ids:
            near = did_you_mean(token, self.token_ids)
            raise InputError(f"The tokenizer has no control token '{token}'{near or '.'}")
        return self.token_ids[token]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        Args:
            ids: Control tokens and unused rows of the vocabulary give nothing.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        return self._plain.decode(
            [int(i) for i in ids if int(i) not in self._controls], skip_special_tokens=False
        )

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise RowError(
                "prompt", "The prompt holds half of a surrogate pair, which is not Unicode text; remove it."
            ) from None


def _check_rules(values: dict[str, Any]) -> None:
    """Raises InputError unless a tokenizer changes and cuts text by Qwen2's rules.

    Another rule may hang on a prompt, use gigabytes of memory, or crash the process.
    """
    rules, patterns = [values.get("normalizer"), values.get("pre_tokenizer")], []
    while rules:
        rule = rules.pop()
        if rule is None:
            continue
        rules += [*rule.get("normalizers", []), *rule.get("pretokenizers", [])]
        if rule["type"] == "Split":
            patterns.append(rule["pattern"].get("Regex"))
        elif rule["type"] not in ("NFC", "ByteLevel", "Sequence"):
            raise InputError(
                f"has the rule {rule['type']:.50}, which Qwen2.5 has not; convert the model again."
            )
    if any(pattern != SPLIT for pattern in patterns):
        raise InputError("cuts text differently from Qwen2.5; convert the model again.")
