"""What the engine calls on CUDA: whole forwards of the decoder, and the operators before and after them.

On a CPU the same forwards run the plain code. Knows nothing of slots or prompts.
"""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from wallaroo.model.attention import KEY_BLOCK
from wallaroo.model.cuda.attention import attend, cache_attention, rotate_and_store
from wallaroo.model.cuda.group_norm import group_norm
from wallaroo.model.cuda.layers import add_rms_norm, guide, rms_norm, swiglu
from wallaroo.model.cuda.operators import OPERATORS
from wallaroo.model.cuda.steps import Fed, draw, feed
from wallaroo.model.decoder import Decoder, Layer
from wallaroo.model.kv_cache import KVCache

__all__ = [
    "LAUNCHES",
    "Fed",
    "decode_layers",
    "draw",
    "feed",
    "group_norm",
    "guide",
    "prefill_layers",
    "refusal",
]

MIN_CAPABILITY = 8, 0
"""Compute capability of the oldest GPU that the kernels are compiled for in tests."""
LAUNCHES = {name: operator.launches for name, operator in OPERATORS.items()}
"""Kernels that a call of an operator starts."""


@functools.cache
def refusal(device: torch.device) -> str:
    """Why the kernels cannot run on a CUDA device; empty if they can.

    Attention with the head sizes of the 7B, which needs the most of a GPU, is tried.
    """
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "the GPU is older than compute capability {}.{}".format(*MIN_CAPABILITY)
    try:
        cache = torch.zeros(1, 4, 1, KEY_BLOCK, 128, device=device, dtype=torch.bfloat16)
        turn, q = cache.new_ones(1, 64), cache.new_zeros(1, 1, 28, 128)
        one = torch.ones(1, device=device, dtype=torch.int64)
        attend(cache.new_zeros(1, (28 + 2 * 4) * 128), turn, turn, one, cache, cache)
        cache_attention(q, cache, cache, one - 1, one.view(1, 1), 1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, a driver or a library that does not fit
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def _layers(
    decoder: Decoder,
    x: Tensor,
    normed: Tensor,
    attention: Callable[[int, Tensor], Tensor],
    hidden: Tensor | None,
) -> Tensor:
    """All layers and the final norm, on a residual x that is written; attention: of layer and qkv."""
    layers = cast(list[Layer], list(decoder.layers))
    norms = [*(layer.input_layernorm for layer in layers), decoder.norm][1:]
    for index, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
        seen = layer.self_attn.o_proj(attention(index, layer.self_attn.qkv_proj(normed)))
        normed = add_rms_norm(x, seen, layer.post_attention_layernorm)
        wide = layer.mlp.down_proj(swiglu(layer.mlp.gate_up_proj(normed)))
        normed = add_rms_norm(x, wide, norm, hidden if norm is decoder.norm else None)
    return normed


def decode_layers(decoder: Decoder, cache: KVCache, fed: Fed, hidden: Tensor) -> None:
    """One step of all sequences. Equals `Decoder`; nine kernels a layer.

    Args:
        decoder: Has the layers.
        cache: `n` rows; new keys and values are written.
        fed: See `feed`; its x is written.
        hidden: `(n, H)`, gets what comes after the final norm.
    """

    def attention(layer: int, qkv: Tensor) -> Tensor:
        return attend(qkv, fed.cos, fed.sin, fed.seen, cache.keys[layer], cache.values[layer])

    _layers(decoder, fed.x, fed.normed, attention, hidden)


def prefill_layers(
    decoder: Decoder,
    cache: KVCache,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    limits: Tensor,
    longest: int,
) -> Tensor:
    """Runs of consecutive tokens of prompts. Equals `Decoder`; nine kernels a layer.

    Args:
        decoder: Has the layers.
        cache: Keys and values of the tokens are written.
        x: Input embeddings, `(runs * t, H)`, written.
        cos: `(runs * t, 1, head_dim / 2)`, see `rope`.
        sin: As `cos`.
        rows: int64 `(runs,)`, cache row of each run.
        limits: int64 `(runs, t)`, place of each token plus one.
        longest: A bound on all limits.

    Returns:
        What comes after the final norm, `(runs * t, H)`.
    """
    runs, tokens = limits.shape
    token_rows, places = rows.unsqueeze(1).expand(runs, tokens).reshape(-1), (limits - 1).view(-1)

    def attention(layer: int, qkv: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        q = rotate_and_store(qkv, cos, sin, keys, values, token_rows, places)
        return cache_attention(
            q.view(runs, tokens, *q.shape[1:]), keys, values, rows, limits, longest
        ).flatten(0, 1)

    return _layers(decoder, x, rms_norm(x, cast(Layer, decoder.layers[0]).input_layernorm), attention, None)
