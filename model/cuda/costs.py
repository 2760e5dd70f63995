"""What the operators here read, write and multiply, for estimates of a GPU's time (see model/roofline.py).

Bytes are those between memory and processor: what a kernel reads again while it is in a cache counts once.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from wallaroo.model.attention import KEY_BLOCK
from wallaroo.model.cuda.attention import SPLIT
from wallaroo.model.roofline import Cost

Arguments = dict[str, Any]


def _size(*tensors: Tensor | None) -> int:
    """Bytes of all tensors."""
    return sum(one.numel() * one.element_size() for one in tensors if one is not None)


def _token_bytes(keys: Tensor) -> int:
    """Bytes of a token's keys and values in one layer."""
    return 2 * keys.shape[1] * keys.shape[-1] * keys.element_size()


def _attend(given: Arguments, lengths: list[int]) -> Cost:
    qkv, keys, out = given["qkv"], given["keys"], given["out"]
    lengths = lengths or [keys.shape[2] * KEY_BLOCK] * len(qkv)
    # The new token's key and value come with qkv.
    cached = sum(max(length - 1, 0) for length in lengths) * _token_bytes(keys)
    new = sum(length > 0 for length in lengths) * _token_bytes(keys)
    splits = sum(-(-length // SPLIT) for length in lengths)
    heads = out.shape[1] // keys.shape[-1]
    partial = splits * heads * (keys.shape[-1] + 2) * 4
    return Cost(
        launches=2,
        read=_size(qkv, given["cos"], given["sin"], given["seen"]) + cached + partial,
        written=_size(out) + new + partial,
        flops=4.0 * sum(lengths) * out.shape[1],
        keys=cached,
    )


def _rotate_and_store(given: Arguments, lengths: list[int]) -> Cost:
    read = _size(*(given[name] for name in ("qkv", "cos", "sin", "rows", "places")))
    return Cost(read=read, written=_size(given["out"]) + len(given["qkv"]) * _token_bytes(given["keys"]))


def _cache_attention(given: Arguments, lengths: list[int]) -> Cost:
    q, keys, longest = given["q"], given["keys"], given["longest"]
    # A bound: the host does not say how long each run is.
    cached = len(q) * longest * _token_bytes(keys)
    return Cost(
        read=_size(q, given["rows"], given["limits"]) + cached,
        written=_size(given["out"]),
        flops=4.0 * q.numel() * longest,
        keys=cached,
    )


def _rms_norm(given: Arguments, lengths: list[int]) -> Cost:
    x, weight = given["x"], given["weight"]
    return Cost(read=_size(x, weight), written=_size(given["out"]), weights=_size(weight))


def _add_rms_norm(given: Arguments, lengths: list[int]) -> Cost:
    residual, x, weight = given["residual"], given["x"], given["weight"]
    return Cost(read=_size(residual, x, weight), written=_size(residual, given["out"]), weights=_size(weight))


def _swiglu(given: Arguments, lengths: list[int]) -> Cost:
    return Cost(read=_size(given["gate_up"]), written=_size(given["out"]))


def _guide(given: Arguments, lengths: list[int]) -> Cost:
    return Cost(read=_size(given["hidden"], given["cfg"], given["null_of"]), written=_size(given["out"]))


def _draw(given: Arguments, lengths: list[int]) -> Cost:
    a_row = ("temperature", "top_k", "advance", "taken", "token")
    few = _size(*(given[name] for name in a_row))
    return Cost(read=_size(given["logits"]) + few, written=few)


def _feed(given: Arguments, lengths: list[int]) -> Cost:
    x, weight = given["x"], given["weight"]
    a_sequence = ("token", "taken", "line", "fed_as", "advance", "length", "position")
    few = _size(*(given[name] for name in a_sequence), given["frequencies"], given["line_end"])
    written = _size(*(given[name] for name in ("length", "position", "x", "normed", "cos", "sin", "seen")))
    return Cost(read=_size(x, weight) + few, written=written, weights=_size(weight))


def _group_norm(given: Arguments, lengths: list[int]) -> Cost:
    x, weights = given["x"], _size(given["weight"], given["bias"])
    # Once for the sums, of which little is left, and once for the result.
    return Cost(launches=3, read=2 * _size(x) + weights, written=_size(given["out"]), weights=weights)


COSTS: dict[str, Callable[[Arguments, list[int]], Cost]] = {
    "wallaroo::attend": _attend,
    "wallaroo::rotate_and_store": _rotate_and_store,
    "wallaroo::cache_attention": _cache_attention,
    "wallaroo::rms_norm": _rms_norm,
    "wallaroo::add_rms_norm": _add_rms_norm,
    "wallaroo::swiglu": _swiglu,
    "wallaroo::guide": _guide,
    "wallaroo::draw": _draw,
    "wallaroo::feed": _feed,
    "wallaroo::group_norm": _group_norm,
}
"""Work of a call, by operator. Functions take the call's arguments by name, and the keys of each sequence of
the group that it is for, the new token's included; an empty list where it is for no group."""
