"""A checkpoint is a folder: configuration, tokenizer, safetensors shards and a list of their digests.

    config.json                          `ModelConfig`
    tokenizer.json                       as Hugging Face's `tokenizers` writes it, control tokens included
    model*.safetensors                   weights under Hugging Face's names, image tokenizer below `vq.`
    checkpoint.json                      size and sha256 of each of these; written last

Knows nothing of object stores: who has a checkpoint elsewhere fetches the listed files first.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.new_folder import FILE_LIST, new_folder
from wallaroo.model.tensor_shapes import Shape, compare_shapes, expected_shapes
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.model.weight_files import (
    DTYPES,
    SHARD_BYTES,
    FileEntry,
    open_shard,
    write_file,
    write_shards,
)

if TYPE_CHECKING:
    import torch

    from wallaroo.model.wallaroo import Wallaroo

TINY = Path(__file__).parent / "tiny"
"""The embedded checkpoint."""

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


def parse_file_list(data: bytes, where: str) -> dict[str, FileEntry]:
    """Reads the contents of a `checkpoint.json`.

    Args:
        data: The contents.
        where: Path of the file, for messages.

    Returns:
        File name -> entry.

    Raises:
        InputError: It does not list plain file names, configuration and tokenizer among them.
    """
    try:
        values = json.loads(data)
        version = values["format"]
        entries = {name: FileEntry(**entry) for name, entry in values["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{where} is not the list of files of a checkpoint; write it again.") from None
    if version != 1:
        raise InputError(f"{where} is of format {version!r:.20}, but this program reads format 1; update it.")
    for name, entry in entries.items():
        plain = name == os.path.basename(name) and not any(sign in name for sign in "\\\0")
        if not plain or name in ("", ".", "..", FILE_LIST) or len(os.fsencode(name)) > 255:
            raise InputError(f"{where} lists '{name[:100]}', but a checkpoint has plain file names only.")
        if not (type(entry.size) is int and entry.size >= 0 and isinstance(entry.sha256, str)):
            raise InputError(
                f"{where} has no valid size and sha256 for '{name}'; write the checkpoint again."
            )
    for name in (CONFIG, TOKENIZER):
        if name not in entries:
            raise InputError(f"{where} does not list {name}, which every checkpoint needs; write it again.")
    return entries


def file_list(folder: str | Path) -> dict[str, FileEntry]:
    """Files of a checkpoint folder; each exists and has its size.

    Args:
        folder: The checkpoint.

    Returns:
        File name -> entry.

    Raises:
        InputError: The folder is not a checkpoint, or a file is missing or of another size.
    """
    folder = Path(folder)
    try:
        # Opening a pipe in its place would block forever.
        if not (folder / FILE_LIST).is_file():
            raise FileNotFoundError
        data = (folder / FILE_LIST).read_bytes()
    except (OSError, ValueError):
        what = "is not a checkpoint: it has no " + FILE_LIST if folder.is_dir() else "is not a folder"
        raise InputError(
            f"The model {folder} {what}; give a folder that `wallaroo convert` wrote, or 'tiny'."
        ) from None
    entries = parse_file_list(data, str(folder / FILE_LIST))
    for name, entry in entries.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {entry.size}"
            raise InputError(f"{file} {state}, so the checkpoint is incomplete; copy or convert it again.")
    return entries


def verify_files(folder: str | Path) -> None:
    """Reads every file of a checkpoint and compares its sha256.

    Raises:
        InputError: A file differs; the first one is named.
    """
    for name, entry in file_list(folder).items():
        with open(Path(folder) / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise InputError(
                    f"{Path(folder) / name} is damaged: its sha256 is not that of {FILE_LIST}; copy it again."
                )


def digest(entries: Mapping[str, FileEntry]) -> str:
    """The model digest, sha256 in hexadecimal, of a checkpoint with these files."""
    lines = [f"{name} {entry.size} {entry.sha256}\n" for name, entry in sorted(entries.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_digest(folder: str | Path) -> str:
    """The model digest of a checkpoint folder. Reads no weights.

    Raises:
        InputError: As `file_list`.
    """
    return digest(file_list(folder))


def load_config(folder: str | Path) -> ModelConfig:
    """Reads the configuration of a checkpoint folder.

    Raises:
        InputError: The folder is no checkpoint, or its `config.json` is wrong.
    """
    file_list(folder)
    return ModelConfig.from_file(Path(folder) / CONFIG)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a checkpoint folder.

    Raises:
        InputError: It is absent, broken or not the model's.
    """
    config = load_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    where = Path(folder) / TOKENIZER
    if tokenizer.token_ids != config.token_ids:
        different = sorted(set(tokenizer.token_ids.items()) ^ set(config.token_ids.items()))
        raise InputError(
            f"{where} and {CONFIG} number the control token '{different[0][0]}' differently; "
            "take both from one conversion."
        )
    if tokenizer.size > config.decoder.vocab_size:
        raise InputError(
            f"{where} has {tokenizer.size} tokens, but the model's vocab_size is "
            f"{config.decoder.vocab_size}; take both from one conversion."
        )
    return tokenizer


def check(folder: str | Path, task: str | None = None) -> ModelConfig:
    """Checks a checkpoint as far as possible without reading its weights.

    Args:
        folder: The checkpoint.
        task: Task that the model must support; None for no such check.

    Returns:
        The configuration.

    Raises:
        InputError: The files are not whole, configuration or tokenizer is wrong, the model cannot do
            `task`, or a tensor is missing, unexpected or wrong-shaped.
    """
    config = load_config(folder)
    if task is not None:
        config.require_task(task)
    load_tokenizer(folder)
    shapes: dict[str, Shape] = {}
    for file, names in _tensors(folder).items():
        with open_shard(file) as shard:
            for name in names:
                piece = shard.get_slice(name)
                shapes[name] = tuple(piece.get_shape())
                if piece.get_dtype() not in DTYPES:
                    raise InputError(
                        f"{file}: tensor '{name}' is of type {piece.get_dtype()}, "
                        f"but only {', '.join(DTYPES)} are read; convert the checkpoint again."
                    )
    compare_shapes(shapes, expected_shapes(config), f"The model {folder}")
    return config


def load(
    folder: str | Path,
    task: str | None = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> "Wallaroo":
    """The model of a checkpoint folder.

    Weights go from the mapped files into place, on a CPU tensor by tensor, to a GPU by several readers.

    Args:
        folder: The checkpoint.
        task: Load only the parts that it needs; None for all.
        device: Where to.
        dtype: Of decoder, vision tower, heads and adapters, float32 by default. The image tokenizer is
            float32 always.

    Returns:
        The model.

    Raises:
        InputError: As `check` does.
    """
    import torch

    config = check(folder, task)
    model = empty_model(config, task, device, torch.float32 if dtype is None else dtype)
    places, files = disk_tensors(model), _tensors(folder)
    if torch.device(device).type == "cuda":
        from wallaroo.model.cuda.loading import fill

        fill(places, files, functools.partial(open_shard, framework="pt"))
        return model.eval()
    with torch.no_grad():
        for file, names in files.items():
            with open_shard(file, "pt") as shard:
                for name in names:
                    if name in places:
                        places[name].copy_(shard.get_tensor(name))
    return model.eval()


def empty_model(
    config: ModelConfig, task: str | None, device: "torch.device | str", dtype: "torch.dtype"
) -> "Wallaroo":
    """A model whose parameters are allocated and not yet filled.

    On the meta device its parameters have no memory, while its buffers are on the CPU.

    Args:
        config: Of the model.
        task: Make only the parts that it needs; None for all.
        device: Where.
        dtype: Of all parameters but those of the image tokenizer, which are float32.

    Returns:
        The model.
    """
    import torch

    from wallaroo.model.wallaroo import Wallaroo

    # Built on the meta device first: layers would initialise 7B weights randomly, which takes minutes.
    with torch.device("meta"):
        model = Wallaroo(config, None if task is None else (task,))
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = torch.float32 if module_name.startswith("vq") else dtype
            memory = torch.empty(parameter.shape, device=device, dtype=kind)
            setattr(module, name, torch.nn.Parameter(memory))
        # Buffers are computed, not stored: the vision tower makes its rotary table when it is built.
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer if str(device) == "meta" else buffer.to(device))
    return model


def disk_parts(name: str, config: ModelConfig) -> dict[str, int | None]:
    """Where one of the model's parameters is stored.

    Args:
        name: Of the parameter.
        config: Of the model.

    Returns:
        Name on disk -> its rows of the parameter; None if it is the whole parameter.
    """
    decoder = config.decoder
    query, kv = decoder.hidden_size, decoder.num_key_value_heads * decoder.head_dim
    fused: dict[str, dict[str, int | None]] = {
        "qkv_proj": {"q_proj": query, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": decoder.intermediate_size, "up_proj": decoder.intermediate_size},
    }
    if name.startswith(("language_model.", "visual.")):
        name = "model." + name
    whole = name.split(".")[-2]
    if name.startswith("model.language_model.") and whole in fused and name.endswith((".weight", ".bias")):
        return {name.replace(whole, part): rows for part, rows in fused[whole].items()}
    return {name: None}


def disk_tensors(model: "Wallaroo") -> dict[str, "torch.Tensor"]:
    """Name on disk -> view on the model's parameters, with the fused projections taken apart."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        names = disk_parts(name, model.config)
        sizes = [len(parameter) if rows is None else rows for rows in names.values()]
        tensors |= zip(names, parameter.detach().split(sizes), strict=True)
    return tensors


def mapped_tensors(folder: str | Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a checkpoint folder, mapped: numbers are read when used.

    Args:
        folder: The checkpoint.

    Returns:
        Name on disk -> tensor.

    Raises:
        InputError: As `check` does.
    """
    check(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file, names in _tensors(folder).items():
        with open_shard(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in names}
    return tensors


def save(
    tensors: "Mapping[str, torch.Tensor] | Wallaroo",
    config: ModelConfig,
    tokenizer_json: str,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    dtype: "torch.dtype | None" = None,
    make: "Callable[[str], torch.Tensor] | None" = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder.

    Args:
        tensors: Tensors by their names on disk, or a model.
        tokenizer_json: Contents of `tokenizer.json`.
        folder: The folder to write; absent or empty, unless `overwrite`.
        shard_bytes: Size of a weight file, unless one tensor alone is larger.
        dtype: Type of the written weights, by default that of each tensor.
        make: Gives a tensor by its name when it is written, for those of `tensors` on the meta device.
        overwrite: Whether the folder may hold files, see `new_folder`.

    Raises:
        InputError: Names or shapes are not those of the configuration, or the disk refuses.
    """
    if not isinstance(tensors, Mapping):
        tensors = disk_tensors(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(shapes, expected_shapes(config), "The model to be saved")
    with new_folder(folder, overwrite) as made:
        entries = dict(write_shards(made, tensors, shard_bytes, dtype, make))
        config_json = json.dumps(config.to_dict(), indent=1) + "\n"
        for name, text in ((CONFIG, config_json), (TOKENIZER, tokenizer_json)):
            entries[name] = write_file(made / name, [text.encode()])
        listed = {"format": 1, "files": {name: entry._asdict() for name, entry in sorted(entries.items())}}
        write_file(made / FILE_LIST, [json.dumps(listed, indent=1).encode() + b"\n"])


def _tensors(folder: str | Path) -> dict[Path, list[str]]:
    """Shard -> names of its tensors. Raises InputError if two shards hold one name."""
    shards: dict[Path, list[str]] = {}
    seen: set[str] = set()
    for name in sorted(file_list(folder)):
        if name.endswith(".safetensors"):
            with open_shard(Path(folder) / name) as shard:
                names = list(shard.keys())
            if twice := seen.intersection(names):
                raise InputError(f"The model {folder} holds tensor '{min(twice)}' twice; convert it again.")
            seen.update(names)
            shards[Path(folder) / name] = names
    return shards
