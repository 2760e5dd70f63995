"""What a checkpoint's `config.json` says: architecture, sizes, prompt layout.

Only numbers differ between the tiny embedded model and the published 7B. Knows nothing of tensors.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wallaroo.model.config_values import build
from wallaroo.model.errors import InputError

VQ_FACTOR = 16
"""Pixels a side of one image token (the VQ model halves the picture four times)."""

TASKS = ("generate", "edit", "understand")

LANGUAGES = ("en", "zh")
"""Languages of prompts; each has its templates."""

MAX_NEW_TOKENS = 256
"""Tokens of an answer where nothing else says how many."""

TOKEN_PIXELS = 28 * 28
"""Pixels of one token of the vision tower."""

CONTEXT_TOKENS = 32768
"""Tokens of the longest row that the backbone was trained on (arXiv 2502.13923)."""

SLOTS = {"cpu": 32, "cuda": 128}
"""Default number of rows that decode at once. More do not speed up a busy GPU. A GPU with less memory takes
fewer."""

SIZES_512 = {
    "0.5": (352, 704),
    "0.52": (352, 672),
    "0.57": (384, 672),
    "0.6": (384, 640),
    "0.68": (416, 608),
    "0.72": (416, 576),
    "0.78": (448, 576),
    "0.82": (448, 544),
    "0.88": (480, 544),
    "0.94": (480, 512),
    "1.0": (512, 512),
    "1.13": (544, 480),
    "1.21": (544, 448),
    "1.29": (576, 448),
    "1.38": (576, 416),
    "1.46": (608, 416),
    "1.67": (640, 384),
    "1.75": (672, 384),
    "2.0": (704, 352),
}
"""Height/width ratio -> (height, width) in pixels: the 19 output sizes of the published 7B."""


class Size(NamedTuple):
    """Size of a picture."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.height // VQ_FACTOR, self.width // VQ_FACTOR

    def __str__(self) -> str:
        return f"{self.width}x{self.height} (width x height)"


@dataclass(frozen=True)
class DecoderConfig:
    """The text decoder: Qwen2.5-VL's language model (arXiv 2502.13923, table 1)."""

    vocab_size: int = 152064
    """Rows of the token table."""
    hidden_size: int = 3584
    """Size of a hidden state (H)."""
    intermediate_size: int = 18944
    """Inner size of an MLP."""
    num_hidden_layers: int = 28
    """Layers."""
    num_attention_heads: int = 28
    """Query heads of a layer."""
    num_key_value_heads: int = 4
    """Key heads of a layer; query heads share them in equal groups."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    """Rotary pairs of the time, height and width axes; they sum to half of `head_dim`."""

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, under the names of transformers' `Qwen2_5_VLVisionConfig`."""

    depth: int = 32
    """Layers."""
    hidden_size: int = 1280
    """Size of a hidden state."""
    hidden_act: str = "silu"
    """Activation of an MLP."""
    intermediate_size: int = 3420
    """Inner size of an MLP."""
    num_heads: int = 16
    """Heads of a layer."""
    in_channels: int = 3
    """Channels of a picture."""
    patch_size: int = 14
    """Side of a patch, in pixels."""
    spatial_merge_size: int = 2
    """Side of the square of patches that become one token."""
    temporal_patch_size: int = 2
    """Frames of a patch; a picture is repeated."""
    tokens_per_second: int = 2
    """Positions per second of a video; pictures do not use it."""
    window_size: int = 112
    """Side of an attention window, in pixels."""
    out_hidden_size: int = 3584
    """Size of an output token; equals the decoder's `hidden_size`."""
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    """Layers that attend to the whole picture; the others attend within windows."""


@dataclass(frozen=True)
class VQConfig:
    """The image tokenizer: LlamaGen's VQ-16 (arXiv 2406.06525)."""

    channels: int = 128
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level over those of the first; each further level halves height and width."""
    residual_blocks: int = 2
    """Residual blocks of a level of the encoder."""
    norm_groups: int = 32
    """Groups of a group norm."""
    z_channels: int = 256
    """Channels of the latent picture."""
    codebook_size: int = 16384
    """Entries of the codebook."""
    codebook_dim: int = 8
    """Size of an entry."""


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` holds."""

    decoder: DecoderConfig = DecoderConfig()
    """The text decoder."""
    vision: VisionConfig = VisionConfig()
    """The vision tower."""
    vq: VQConfig = VQConfig()
    """The image tokenizer."""
    name: str = "wallaroo"
    """Name of the checkpoint, for messages."""
    layout: str = "eval"
    """`eval` or `train`: where size indicators and assistant header stand in a prompt."""
    indicators: str = "added"
    """`added` (one token each) or `text` (spelled out in ordinary tokens)."""
    line_break: bool = True
    """Whether `<|end_of_line>|` separates the rows of an image and prompts carry size indicators.

    Square checkpoints of the early stages have neither.
    """
    tasks: tuple[str, ...] = TASKS
    """Tasks of the checkpoint; checkpoints of stages 1 to 3 cannot edit."""
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=lambda: dict(SIZES_512))
    """Ratio of height to width -> (height, width) in pixels."""
    edit_pixels: tuple[int, int] = (12544, 188160)
    """Minimum and maximum pixels of the source of an edit, as input of the vision tower."""
    understand_pixels: tuple[int, int] = (12544, 188160)
    """Minimum and maximum pixels of the picture of a question, as input of the vision tower."""
    trained_tokens: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"generate": 1632, "edit": 2624, "understand": 1504}
    )
    """Task -> longest row seen in training, in tokens."""
    token_ids: dict[str, int] = dataclasses.field(default_factory=dict)
    """Text of a control token -> its id."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("layout", self.layout, ("eval", "train")),
            ("indicators", self.indicators, ("added", "text")),
        ):
            if value not in allowed:
                raise InputError(
                    f"config.json: {name} is '{value}', but must be one of {', '.join(allowed)}."
                )
        for task in self.tasks:
            if task not in TASKS:
                raise InputError(f"config.json: tasks names '{task}', but only {', '.join(TASKS)} exist.")
        for part in (self.decoder, self.vision, self.vq):
            _check_numbers(part)
        _check_decoder(self.decoder)
        if self.vision.out_hidden_size != self.decoder.hidden_size:
            raise InputError(
                f"config.json: vision out_hidden_size {self.vision.out_hidden_size} must equal "
                f"hidden_size {self.decoder.hidden_size}."
            )
        _check_vision(self.vision)
        _check_vq(self.vq)
        for name, (least, most) in (
            ("edit_pixels", self.edit_pixels),
            ("understand_pixels", self.understand_pixels),
        ):
            if not 1 <= least <= most:
                raise InputError(
                    f"config.json: {name} is {least} to {most}, but must be two increasing positive numbers."
                )
        for token, index in self.token_ids.items():
            if index >= self.decoder.vocab_size:
                raise InputError(
                    f"config.json: token id {index} of '{token}' must be below vocab_size "
                    f"{self.decoder.vocab_size}."
                )
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise InputError(
                f"config.json: tasks is {list(self.tasks)}, but must name each task once, and at least one."
            )
        _check_sizes(self.sizes)

    def size_list(self) -> list[Size]:
        """The sizes of the table, in its order."""
        return [Size(*size) for size in self.sizes.values()]

    def bucket(self, height: int, width: int) -> Size:
        """The size whose ratio key is nearest to height/width; the first one on a tie.

        Args:
            height: Of a picture, in pixels.
            width: Of a picture, in pixels.

        Returns:
            One of `sizes`.
        """
        ratio = height / width
        key = min(self.sizes, key=lambda key: abs(float(key) - ratio))
        return Size(*self.sizes[key])

    def with_pixels(self, least: int | None, most: int | None) -> "ModelConfig":
        """The configuration with other limits of pictures to be understood.

        Args:
            least: Pixels that the vision tower sees at least; None leaves the limit as it is.
            most: Pixels that it sees at most; None leaves the limit as it is.

        Returns:
            The new configuration.

        Raises:
            InputError: The limits are in the wrong order.
        """
        own_least, own_most = self.understand_pixels
        limits = (own_least if least is None else least, own_most if most is None else most)
        if limits[0] > limits[1]:
            first, second = (
                f"{limit:,}{'' if given is not None else ' by the checkpoint'}"
                for limit, given in zip(limits, (least, most), strict=True)
            )
            raise InputError(
                f"min_pixels is {first}, but must be at most max_pixels, which is {second}: give both."
            )
        return dataclasses.replace(self, understand_pixels=limits)

    def require_task(self, task: str) -> None:
        """Checks that the checkpoint can do a task.

        Raises:
            InputError: It cannot, or there is no such task.
        """
        if task not in TASKS:
            raise InputError(f"There is no task '{task}'; the tasks are {', '.join(TASKS)}.")
        if task not in self.tasks:
            why = " (those of training stages 1 to 3 have no parts for editing)" if task == "edit" else ""
            raise InputError(
                f"The checkpoint '{self.name}' cannot {task}{why}: its tasks are {', '.join(self.tasks)}; "
                f"use a checkpoint that was trained for it."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Makes the configuration from the object in `config.json`.

        Raises:
            InputError: A key is unknown (the message has the nearest known one), or a value is wrong.
        """
        return build(cls, values, "config.json")

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads `config.json`.

        Raises:
            InputError: The file is absent or no JSON object, a key is unknown, or a value is wrong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); a checkpoint needs it.") from None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON ({error}).") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold a JSON object, not a {type(values).__name__}.")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `config.json`."""
        return dataclasses.asdict(self)


_MOST_PIXELS = 2**26

_DEEPEST = 1024
"""Maximum of layers and of blocks, far above any real configuration."""


def _check_numbers(part: DecoderConfig | VisionConfig | VQConfig) -> None:
    for name, value in dataclasses.asdict(part).items():
        if isinstance(value, int) and value < 1:
            raise InputError(f"config.json: {name} is {value}, but must be at least 1.")
        if name in ("num_hidden_layers", "depth", "residual_blocks") and value > _DEEPEST:
            raise InputError(f"config.json: {name} is {value}, but must be at most {_DEEPEST}.")


def _check_decoder(decoder: DecoderConfig) -> None:
    if decoder.hidden_size % decoder.num_attention_heads:
        raise InputError(
            f"config.json: hidden_size {decoder.hidden_size} is not a multiple of "
            f"num_attention_heads {decoder.num_attention_heads}."
        )
    if decoder.num_attention_heads % decoder.num_key_value_heads:
        raise InputError(
            f"config.json: num_attention_heads {decoder.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {decoder.num_key_value_heads}."
        )
    if 2 * sum(decoder.mrope_section) != decoder.head_dim:
        raise InputError(
            f"config.json: mrope_section {list(decoder.mrope_section)} must sum to half of the "
            f"head dimension {decoder.head_dim}."
        )


def _check_vq(vq: VQConfig) -> None:
    if len(vq.channel_multipliers) != 1 + int(math.log2(VQ_FACTOR)):
        raise InputError(
            f"config.json: channel_multipliers {list(vq.channel_multipliers)} must be "
            f"{1 + int(math.log2(VQ_FACTOR))} numbers, for a token is {VQ_FACTOR} pixels a side."
        )
    for multiplier in vq.channel_multipliers:
        if multiplier < 1 or vq.channels * multiplier % vq.norm_groups:
            raise InputError(
                f"config.json: channels {vq.channels} times channel multiplier {multiplier} must be "
                f"a positive multiple of norm_groups {vq.norm_groups}."
            )


def _check_sizes(sizes: dict[str, tuple[int, int]]) -> None:
    if not sizes:
        raise InputError("config.json: sizes is empty, but at least one size is needed.")
    for key, (height, width) in sizes.items():
        if not _is_ratio(key):
            raise InputError(
                f"config.json: sizes has the key '{key}', but keys are ratios of height to width."
            )
        if height % VQ_FACTOR or width % VQ_FACTOR or height <= 0 or width <= 0:
            raise InputError(
                f"config.json: size {height}x{width} of ratio {key} must have sides that are "
                f"positive multiples of {VQ_FACTOR}."
            )
        if height * width > _MOST_PIXELS:
            raise InputError(f"config.json: size {height}x{width} has more than {_MOST_PIXELS:,} pixels.")


def _check_vision(vision: VisionConfig) -> None:
    published = VisionConfig()
    for name in ("in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size", "hidden_act"):
        value, only = getattr(vision, name), getattr(published, name)
        if value != only:
            raise InputError(
                f"config.json: vision {name} is {value}, but images are prepared for {only} only."
            )
    if vision.hidden_size % (4 * vision.num_heads):
        raise InputError(
            f"config.json: vision hidden_size {vision.hidden_size} must be a multiple of four times "
            f"num_heads {vision.num_heads}."
        )
    for block in vision.fullatt_block_indexes:
        if block >= vision.depth:
            raise InputError(
                f"config.json: fullatt_block_indexes names block {block}, but depth is {vision.depth}."
            )
    token = vision.patch_size * vision.spatial_merge_size
    if vision.window_size < token:
        raise InputError(f"config.json: window_size {vision.window_size} must be at least {token} pixels.")


def _is_ratio(key: str) -> bool:
    try:
        return 0 < float(key) < math.inf
    except ValueError:
        return False
