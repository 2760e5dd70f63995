"""The text decoder: Qwen2.5-VL's language model with fused projections (arXiv 2502.13923).

One forward serves training, prefill and decode: the caller gives the attention (`Attend`). Knows nothing of
caches, slots or sampling.
"""

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wallaroo.model.config import DecoderConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> output: q `(tokens, heads, head_dim)`, k and v `(tokens, kv_heads, head_dim)`,
output `(tokens, heads * head_dim)`."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019).

    Args:
        size: Numbers of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x `(..., size)`."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # torch's own goes over x four times there.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.rsqrt(length * length / x.shape[-1] + self.eps) * self.weight


def _added(residual: Tensor, linear: nn.Module, x: Tensor) -> Tensor:
    """residual + linear(x); a packed product is added where it is computed."""
    if isinstance(linear, PackedLinear):
        return linear(x, residual)
    return residual + linear(x)


class Attention(nn.Module):
    """Grouped-query attention, added to a residual.

    Query, key and value projections are one matrix, in that order.

    Args:
        config: Of the decoder.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim
        self.qkv_proj = nn.Linear(config.hidden_size, (heads + 2 * kv_heads) * dim)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)

    def forward(
        self, residual: Tensor, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        """Attends, and adds the result to the residual.

        Args:
            residual: `(tokens, H)`.
            x: The residual after its norm, `(tokens, H)`.
            layer: Number of the layer.
            cos: Cosines of the rotary angles, as `rotate` takes them.
            sin: Sines of the same angles.
            attend: Attends to the cache.

        Returns:
            The sum, `(tokens, H)`.
        """
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        turned = self.heads + self.kv_heads
        qk = rotate(qkv[:, :turned], cos, sin)
        out = attend(layer, qk[:, : self.heads], qk[:, self.heads :], qkv[:, turned:])
        return _added(residual, self.o_proj, out)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), added to a residual; gate and up projections are one matrix, in that order.

    Args:
        config: Of the decoder.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        """Adds the MLP's output to the residual.

        Args:
            residual: `(tokens, H)`.
            x: The residual after its norm, `(tokens, H)`.

        Returns:
            The sum, `(tokens, H)`.
        """
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return _added(residual, self.down_proj, F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and MLP, each behind its norm and added to what came in.

    Args:
        config: Of the decoder.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Runs the layer.

        Args:
            x: The residual, `(tokens, H)`.
            layer: Number of the layer.
            cos: Cosines of the rotary angles, as `rotate` takes them.
            sin: Sines of the same angles.
            attend: Attends to the cache.

        Returns:
            The residual with attention and MLP added, `(tokens, H)`.
        """
        x = self.self_attn(x, self.input_layernorm(x), layer, cos, sin, attend)
        return self.mlp(x, self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, layers and final norm.

    Args:
        config: Sizes of its parts.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        # Uniform: the usual normal numbers import torch's compiler on the meta device, which takes a second.
        table = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm.

        Args:
            x: Input embeddings `(tokens, H)`.
            cos: `(tokens, 1, head_dim / 2)`, see `rope`.
            sin: As `cos`.
            attend: Attention of a layer.

        Returns:
            `(tokens, H)`.
        """
        for index, layer in enumerate(self.layers):
            x = layer(x, index, cos, sin, attend)
        return self.norm(x)


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has laid out for a number of inputs.

    MKL, which `F.linear` calls, leaves the wide vectors of other CPUs than Intel's unused; there this is
    twice as fast.

    Args:
        linear: The layer.
        rows: Inputs of a forward.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.weight, self.bias = _laid_out(linear.weight, rows), linear.bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Multiplies, and adds a residual if one is given.

        Args:
            x: `(rows, inputs)`.
            residual: `(rows, outputs)`, or None.

        Returns:
            `(rows, outputs)`.
        """
        if residual is not None:
            added: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self.weight, self.bias, "add"
            )
            return added
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class PackedMLP(nn.Module):
    """An MLP of weights laid out by oneDNN, as in PackedLinear.

    Activation and product are computed where the matrix products write their results.

    Args:
        mlp: The MLP.
        rows: Inputs of a forward.
    """

    def __init__(self, mlp: MLP, rows: int):
        super().__init__()
        self.gate, self.up = (_laid_out(part, rows) for part in mlp.gate_up_proj.weight.chunk(2))
        self.down_proj = PackedLinear(mlp.down_proj, rows)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        """Adds the MLP's output to the residual.

        Args:
            residual: `(rows, H)`.
            x: The residual after its norm, `(rows, H)`.

        Returns:
            The sum, `(rows, H)`.
        """
        gate = torch.ops.mkldnn._linear_pointwise(x, self.gate, None, "swish", [], "")
        wide = torch.ops.mkldnn._linear_pointwise.binary(x, gate, self.up, None, "mul")
        return cast(Tensor, self.down_proj(wide, residual))


PACKED_BYTES = 16 << 20
"""Of the largest matrix that is packed."""

PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this torch can multiply by packed matrices."""

Part = TypeVar("Part", bound=nn.Module)


def _laid_out(weight: Tensor, rows: int) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return laid_out


def _is_packed(linear: nn.Linear) -> bool:
    weight = linear.weight.detach()
    # Weights in 8 bits are tensors of another class.
    plain = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
    return PACKS and plain and weight.nbytes <= PACKED_BYTES


def packed(part: Part, rows: int) -> Part:
    """The same part of a model, its weights shared, for forwards of exactly `rows` tokens.

    On CPUs it holds float32 matrices of up to PACKED_BYTES once more, packed. Larger ones wait for memory
    more than for arithmetic, and on other devices nothing is gained.

    Args:
        part: Of the model.
        rows: Tokens of each forward.

    Returns:
        A copy with packed layers, or the same layer where packing does not apply.
    """
    if isinstance(part, nn.Linear):
        return cast(Part, PackedLinear(part, rows)) if _is_packed(part) else part
    if isinstance(part, MLP) and _is_packed(part.gate_up_proj) and _is_packed(part.down_proj):
        return cast(Part, PackedMLP(part, rows))
    made = copy.copy(part)
    made._modules = {name: child and packed(child, rows) for name, child in part._modules.items()}
    return made


def product_in_float32(linear: nn.Module, x: Tensor) -> Tensor:
    """The product of a linear layer without bias, in float32.

    On CUDA it is never rounded to the type of x: logits of 8 to 32 would step by a sixteenth to an eighth in
    bfloat16.

    Args:
        linear: The layer.
        x: `(n, inputs)`.

    Returns:
        float32 `(n, outputs)`.
    """
    weight = cast(Tensor, linear.weight)
    if x.device.type == "cuda" and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return cast(Tensor, linear(x)).float()


def rope_frequencies(config: DecoderConfig, device: torch.device | str | None = None) -> Tensor:
    """Rotary frequencies (Su et al. 2021).

    Args:
        config: Of the decoder.
        device: Of the result.

    Returns:
        Angle per position of each rotary pair, in radians; float32 `(head_dim / 2,)`.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.rope_theta**exponent


def rope(
    positions: Tensor, frequencies: Tensor, sections: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of multimodal rotary positions (MRoPE, arXiv 2409.12191).

    Args:
        positions: `(3, tokens)`: time, height, width.
        frequencies: `(head_dim / 2,)`.
        sections: Pairs of each axis, dealt in order.
        dtype: Of the result.

    Returns:
        Two tensors `(tokens, 1, head_dim / 2)`.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    parts = angles.split(list(sections), dim=-1)
    angle = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + head_dim / 2) of x by their angles.

    Args:
        x: Queries or keys, `(tokens, heads, head_dim)`.
        cos: Cosines of the angles; broadcasts to `(tokens, heads, head_dim / 2)`.
        sin: Sines of the same angles.

    Returns:
        As x.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
