"""Safetensors files, read mapped and written tensor by tensor.

Knows nothing of which tensors a model has.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors

from wallaroo.model.errors import InputError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 * 2**30
"""Size of a shard, unless one tensor alone is larger."""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The number formats a checkpoint may hold: name in safetensors -> name in torch."""


class FileEntry(NamedTuple):
    """What `checkpoint.json` says of a file."""

    size: int
    """In bytes."""
    sha256: str
    """In hexadecimal."""


@contextmanager
def open_shard(file: Path, framework: str = "np") -> Iterator[Any]:
    """A mapped safetensors file.

    Args:
        file: The file.
        framework: `np` for names and shapes, which needs no torch; `pt` for weights.

    Yields:
        The open file of safetensors.

    Raises:
        InputError: The file is not whole.
    """
    try:
        with safetensors.safe_open(file, framework=framework) as shard:
            yield shard
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{file} is not a complete safetensors file ({error}); copy or convert it again."
        ) from None


def shard_names(
    tensors: "Mapping[str, torch.Tensor]", shard_bytes: int, dtype: "torch.dtype | None" = None
) -> list[list[str]]:
    """Distributes tensors over weight files.

    Args:
        tensors: Name -> tensor.
        shard_bytes: Most bytes of a file, unless one tensor is larger.
        dtype: That the tensors will be written in; None for their own.

    Returns:
        Names of the tensors of each file, in the order in which they are written.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * (dtype or tensors[name].dtype).itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    # Wider numbers first, so that every tensor starts at a multiple of its item size.
    return [
        sorted(names, key=lambda name: (-(dtype or tensors[name].dtype).itemsize, name)) for names in shards
    ]


def write_shards(
    folder: Path,
    tensors: "Mapping[str, torch.Tensor]",
    shard_bytes: int,
    dtype: "torch.dtype | None",
    make: "Callable[[str], torch.Tensor] | None" = None,
) -> Iterator[tuple[str, FileEntry]]:
    """Writes tensors as `model-00001-of-0000N.safetensors`.

    Holds one tensor in memory at a time, and none if the tensors are mapped and of the right type.

    Args:
        folder: Where to.
        tensors: Name on disk -> tensor.
        shard_bytes: Size of a file, unless one tensor alone is larger.
        dtype: Type of the written tensors; None keeps each one's own.
        make: Gives the tensors that are on the meta device, by name.

    Yields:
        Name and entry of each file.
    """
    shards = shard_names(tensors, shard_bytes, dtype)
    for number, names in enumerate(shards, 1):
        place = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        file = f"model{place}.safetensors"
        kinds = dict.fromkeys(names, dtype)
        yield file, write_safetensors(folder / file, {name: tensors[name] for name in names}, kinds, make)


def write_safetensors(
    file: Path,
    tensors: "Mapping[str, torch.Tensor]",
    dtypes: "Mapping[str, torch.dtype | None]",
    make: "Callable[[str], torch.Tensor] | None" = None,
) -> FileEntry:
    """Writes one safetensors file tensor by tensor.

    The library's own writer makes a copy of the whole file in memory.

    Args:
        file: The file.
        tensors: Name on disk -> tensor.
        dtypes: Name -> type to write; None keeps the tensor's own.
        make: Gives the tensors that are on the meta device, by name.

    Returns:
        Size and sha256 of the file.

    Raises:
        InputError: A type is not written, or the disk refuses.
    """
    import torch

    codes = {getattr(torch, name): code for code, name in DTYPES.items()}
    kinds = {name: dtypes[name] or tensor.dtype for name, tensor in tensors.items()}
    # Wider numbers first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        if kinds[name] not in codes:
            raise InputError(
                f"Tensor '{name}' is of type {kinds[name]}; only {', '.join(DTYPES)} are written."
            )
        end = offset + tensors[name].numel() * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": codes[kinds[name]], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterator[Any]:
        yield len(head).to_bytes(8, "little") + head
        for name in order:
            tensor = tensors[name]
            if tensor.is_meta and make is not None:
                tensor = make(name)
            tensor = tensor.detach().to("cpu", kinds[name]).contiguous()
            yield tensor.view(-1).view(torch.uint8).numpy().data

    return write_file(file, chunks())


def write_file(file: Path, chunks: Iterable[Any]) -> FileEntry:
    """Writes a file and syncs it to the disk.

    Args:
        file: The file.
        chunks: Its bytes, in pieces.

    Returns:
        Size and sha256.

    Raises:
        InputError: The disk refuses.
    """
    size, sha256 = 0, hashlib.sha256()
    try:
        with open(file, "wb") as out:
            for chunk in chunks:
                out.write(chunk)
                sha256.update(chunk)
                size += len(chunk)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}); make room, or fix its permissions."
        ) from None
    return FileEntry(size, sha256.hexdigest())
