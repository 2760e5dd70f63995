"""The image tokenizer, LlamaGen's VQ-16 (arXiv 2406.06525), for inference.

Pixels become latents, tokens become pixels; one token stands for 16 x 16 pixels. Knows nothing of what
chooses the tokens.

The arithmetic is kept in plain steps, in the plain memory layout: with the same torch kernels it gives the
pixels of the published model bit for bit, which fused activations and attention do not. In the layout
`channels_last` convolutions are a fifth faster on a CPU, but its group norm loses a digit on large pictures,
enough to move one uint8 value in 600 by a level.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wallaroo.model.config import VQConfig

NORM_EPS = 1e-6
PIXEL_CHANNELS = 3


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def _norm_swish(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, ChannelsLastNorm):
        return norm(x, swish=True)
    # The norm's result is fresh memory, so that the product may be made in place.
    normed = norm(x)
    return normed.mul_(torch.sigmoid(normed))


class ChannelsLastNorm(nn.Module):
    """A group norm of pictures `[B, C, H, W]` in channels-last memory, with swish where asked.

    torch's own would rearrange the pictures, there and back.

    Args:
        norm: The weights.
        kernels: Whether to use the operator of `model.cuda`.
    """

    def __init__(self, norm: nn.GroupNorm, kernels: bool):
        super().__init__()
        self.norm, self.kernels = norm, kernels

    def forward(self, x: Tensor, swish: bool = False) -> Tensor:
        """Normalises x.

        Args:
            x: [B, C, H, W].
            swish: Whether swish follows.

        Returns:
            As x.
        """
        norm = self.norm
        if self.kernels:
            from wallaroo.model.cuda import ops

            return ops.group_norm(norm, x, swish)
        batch, channels, height, width = x.shape
        grouped = x.permute(0, 2, 3, 1).view(batch, height * width, norm.num_groups, -1)
        variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
        scale = norm.weight.view(1, norm.num_groups, -1) * torch.rsqrt(variance + norm.eps).unsqueeze(-1)
        shift = norm.bias.view(1, norm.num_groups, -1) - mean.unsqueeze(-1) * scale
        normed = torch.addcmul(shift.view(batch, channels, 1, 1), x, scale.view(batch, channels, 1, 1))
        return F.silu(normed, inplace=True) if swish else normed


def _channels_last(part: nn.Module, kernels: bool) -> nn.Module:
    """A copy of a part of the model, with other weights in convolutions only and with other norms."""
    if isinstance(part, nn.GroupNorm):
        return ChannelsLastNorm(part, kernels)
    made = copy.copy(part)
    made._modules = {name: child and _channels_last(child, kernels) for name, child in part._modules.items()}
    if isinstance(part, nn.Conv2d):
        weight = part.weight.detach().contiguous(memory_format=torch.channels_last)
        made._parameters = part._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
    return made


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = _norm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(_norm_swish(self.norm1, x))
        inner = self.conv2(_norm_swish(self.norm2, inner))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + inner


class _Attention(nn.Module):
    """Every position of the map attends to every other, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))
        scores = query.transpose(1, 2) @ key * query.shape[1] ** -0.5
        mixed = value @ scores.softmax(-1).transpose(1, 2)
        return x + self.proj_out(mixed.view(x.shape))


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks, each followed by attention on the lowest level, then a change of size, if any."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, attention: bool):
        super().__init__()
        widths = [inputs] + [outputs] * (blocks - 1)
        self.res = nn.ModuleList(_Residual(width, outputs, groups) for width in widths)
        self.attn = nn.ModuleList(_Attention(outputs, groups) for _ in widths if attention)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    blocks = (
        _Residual(channels, channels, groups),
        _Attention(channels, groups),
        _Residual(channels, channels, groups),
    )
    return nn.ModuleList(blocks)


class _Coder(nn.Module):
    """What encoder and decoder share; they differ in the order of their levels and of the middle."""

    conv_in: nn.Conv2d
    conv_blocks: nn.ModuleList
    mid: nn.ModuleList
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def run(self, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        x = self.conv_in(x)
        for block in blocks:
            x = block(x)
        return self.conv_out(_norm_swish(self.norm_out, x))


class _Encoder(_Coder):
    def __init__(self, config: VQConfig):
        super().__init__()
        groups, widths = config.norm_groups, [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(PIXEL_CHANNELS, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = config.channels
        for index, outputs in enumerate(widths):
            lowest = index == len(widths) - 1
            level = _Level(width, outputs, config.residual_blocks, groups, attention=lowest)
            if not lowest:
                level.downsample = _Downsample(outputs)
            self.conv_blocks.append(level)
            width = outputs
        self.mid = _middle(width, groups)
        self.norm_out = _norm(groups, width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, [*self.conv_blocks, *self.mid])


class _Decoder(_Coder):
    def __init__(self, config: VQConfig):
        super().__init__()
        groups, widths = config.norm_groups, [config.channels * m for m in config.channel_multipliers]
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = _middle(width, groups)
        self.conv_blocks = nn.ModuleList()
        for index, outputs in enumerate(reversed(widths)):
            level = _Level(width, outputs, config.residual_blocks + 1, groups, attention=index == 0)
            if index < len(widths) - 1:
                level.upsample = _Upsample(outputs)
            self.conv_blocks.append(level)
            width = outputs
        self.norm_out = _norm(groups, width)
        self.conv_out = nn.Conv2d(width, PIXEL_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, [*self.mid, *self.conv_blocks])


class _Quantizer(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        # Uniform, as the decoder's.
        table = torch.empty(config.codebook_size, config.codebook_dim).uniform_(-1, 1)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)


class VQModel(nn.Module):
    """The image tokenizer: pictures to codebook indices and back.

    Parameter names are those of the published file, without the buffer `quantize.codebook_used`.

    A picture's numbers do not depend on the other pictures of a batch, but their last bits depend on the
    batch size. For equal bytes, use one batch size.

    Args:
        config: Of the tokenizer.
    """

    channels_last = False
    """Whether the decoder is laid out so; see `for_cuda`."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = _Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def for_cuda(self, kernels: bool) -> "VQModel":
        """The same model with a decoder of its own for CUDA.

        The decoder's weights are laid out for pictures whose channels lie together, as tensor cores take
        them.

        Args:
            kernels: Whether norms are operators of `model.cuda`.

        Returns:
            The model; it shares the weights that stay the same.
        """
        made = copy.copy(self)
        made._modules = self._modules | {"decoder": _channels_last(self.decoder, kernels)}
        made.channels_last = True
        return made

    def codebook(self) -> Tensor:
        """The entries, each of length 1: [C, 8]."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] from -1 to 1 -> latents of length 1, not quantised: [B, 8, h, w]."""
        return F.normalize(self.quant_conv(self.encoder(pixels.contiguous())), dim=1)

    def quantise(self, latents: Tensor) -> Tensor:
        """Latents of length 1 [B, 8, h, w] -> nearest entries, the lowest on a tie: int64 [B, h, w]."""
        points, entries = latents.movedim(1, -1), self.codebook()
        distances = points.square().sum(-1, keepdim=True) + entries.square().sum(-1) - 2 * points @ entries.T
        return distances.argmin(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, h, w] -> pictures [B, 3, 16 h, 16 w], nominally from -1 to 1, not clamped."""
        entries = F.embedding(tokens, self.codebook()).movedim(-1, 1)
        if not self.channels_last:
            entries = entries.contiguous()
        return self.decoder(self.post_quant_conv(entries))


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """A context in which convolutions on CUDA have this precision. Elsewhere nothing changes.

    Args:
        name: `tf32` (10 bits after the point) or `float32`.
        device: Where the convolutions run.

    Yields:
        Nothing.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures [..., 3, H, W] nominally from -1 to 1 -> uint8 [..., H, W, 3], cut off and truncated."""
    return (127.5 * pictures + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 pictures [..., H, W, 3] -> float32 [..., 3, H, W] from -1 to 1, for `VQModel.encode`."""
    return ((pictures.to(torch.float32) / 255 - 0.5) / 0.5).movedim(-1, -3)
