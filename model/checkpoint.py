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
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors

from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from wallaroo.model.wallaroo import Wallaroo

TINY = Path(__file__).parent / "tiny"
"""The small checkpoint that comes with the program."""

FILE_LIST = "checkpoint.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

SHARD_BYTES = 4 * 2**30
"""Size of a shard, unless one tensor alone is larger."""

_PARTS = {
    "generate": ("model.language_model.", "gen_image_head.", "gen_input_adapter.", "vq."),
    "edit": (
        "model.language_model.",
        "model.visual.",
        "edit_image_head.",
        "edit_input_adapter.",
        "pixel_adapter.",
        "vq.",
    ),
    "understand": ("model.language_model.", "model.visual.", "lm_head."),
}
"""Task -> beginnings of the names of the tensors that it needs."""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The number formats a checkpoint may hold: name in safetensors -> name in torch."""

_NAMED_AT_MOST = 100
"""Names of tensors in one message; a foreign checkpoint may differ in every one."""

Shape = tuple[int, ...]


class FileEntry(NamedTuple):
    """What `checkpoint.json` says of a file: size in bytes, sha256 in hexadecimal."""

    size: int
    sha256: str


def parse_file_list(data: bytes, where: str) -> dict[str, FileEntry]:
    """File name -> entry, from the contents of a `checkpoint.json` found at `where`.

    Raises InputError unless it lists plain file names, the configuration and the tokenizer among them.
    """
    try:
        values = json.loads(data)
        version = values["format"]
        entries = {name: FileEntry(**entry) for name, entry in values["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{where} is not the list of files of a checkpoint; write it anew.") from None
    if version != 1:
        raise InputError(f"{where} is of format {version!r:.20}, but this program reads format 1; update it.")
    for name, entry in entries.items():
        plain = name == os.path.basename(name) and not any(sign in name for sign in "\\\0")
        if not plain or name in ("", ".", "..", FILE_LIST) or len(os.fsencode(name)) > 255:
            raise InputError(f"{where} lists '{name[:100]}', but a checkpoint has plain file names only.")
        if not (type(entry.size) is int and entry.size >= 0 and isinstance(entry.sha256, str)):
            raise InputError(f"{where} has no valid size and sha256 for '{name}'; write the checkpoint anew.")
    for name in (CONFIG, TOKENIZER):
        if name not in entries:
            raise InputError(f"{where} does not list {name}, which every checkpoint needs; write it anew.")
    return entries


def file_list(folder: str | Path) -> dict[str, FileEntry]:
    """File name -> entry of a checkpoint folder; each file is there and has its size.

    Raises InputError if the folder is none, or a file is missing or of another size.
    """
    folder = Path(folder)
    try:
        # A pipe in its place would be waited for without end.
        if not (folder / FILE_LIST).is_file():
            raise FileNotFoundError
        data = (folder / FILE_LIST).read_bytes()
    except (OSError, ValueError):
        what = "is not a checkpoint: it has no " + FILE_LIST if folder.is_dir() else "is no folder"
        raise InputError(
            f"The model {folder} {what}; give a folder that `wallaroo convert` wrote, or 'tiny'."
        ) from None
    entries = parse_file_list(data, str(folder / FILE_LIST))
    for name, entry in entries.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {entry.size}"
            raise InputError(f"{file} {state}, so the checkpoint is not whole; copy or convert it again.")
    return entries


def verify_files(folder: str | Path) -> None:
    """Read every file of a checkpoint and compare its sha256; InputError names the first that differs."""
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
    """The model digest of a checkpoint folder; reads no weights. InputError as `file_list`."""
    return digest(file_list(folder))


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a checkpoint folder; InputError if it is none or its `config.json` is wrong."""
    file_list(folder)
    return ModelConfig.from_file(Path(folder) / CONFIG)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; InputError if it is absent, broken or not the model's."""
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
    """Everything about a checkpoint that can be told without reading its weights: its configuration.

    Raises InputError if the files are not whole, the configuration or tokenizer is wrong, the model
    cannot do `task`, or a tensor is missing, unexpected or wrong-shaped.
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


def compare_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Raises one InputError that names every missing, unexpected and wrong-shaped tensor of `what`."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{kind}: {_enumerate(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise InputError(f"{what} does not have the tensors of its configuration; {'; '.join(problems)}.")


def expected_shapes(config: ModelConfig, task: str | None = None) -> dict[str, Shape]:
    """Name on disk -> shape of every tensor of a checkpoint, or of those that one task needs."""
    tasks = config.tasks if task is None else (task,)
    prefixes = tuple(prefix for task in tasks for prefix in _PARTS[task])
    return {name: shape for name, shape in _shapes(config) if name.startswith(prefixes)}


def load(
    folder: str | Path,
    task: str | None = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> "Wallaroo":
    """The model of a checkpoint folder, with the parts that `task` needs (all by default).

    dtype: of decoder, vision tower, heads and adapters, float32 by default; the image tokenizer is
    float32 always. Weights go from the mapped files into place, on a CPU tensor by tensor, to a GPU by
    several readers. Raises InputError as `check` does.
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
    """A model with the parts of `task` (all by default), its parameters allocated and not yet filled.

    On the meta device its parameters have no memory, while its buffers are on the CPU.
    """
    import torch

    from wallaroo.model.wallaroo import Wallaroo

    # Built without memory first: the constructors of layers would fill 7B numbers by chance, for minutes.
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
    """Name on disk -> rows of each part of one of the model's parameters; None if it is the whole one."""
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
    """The tensors of a checkpoint folder by their names on disk, mapped: numbers are read when used.

    Raises InputError as `check` does.
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
) -> None:
    """Write a checkpoint folder, which must not exist yet or be empty.

    Args:
        tensors: Tensors by their names on disk, or a model.
        tokenizer_json: Contents of `tokenizer.json`.
        folder: The folder to write.
        shard_bytes: Size of a weight file, unless one tensor alone is larger.
        dtype: Type of the written weights, by default that of each tensor.
        make: Gives a tensor by its name when it is written, for those of `tensors` on the meta device.

    Raises:
        InputError: Names or shapes are not those of the configuration, or the disk refuses.
    """
    if not isinstance(tensors, Mapping):
        tensors = disk_tensors(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(shapes, expected_shapes(config), "The model to be saved")
    with new_folder(folder) as made:
        entries = dict(write_shards(made, tensors, shard_bytes, dtype, make))
        config_json = json.dumps(config.to_dict(), indent=1) + "\n"
        for name, text in ((CONFIG, config_json), (TOKENIZER, tokenizer_json)):
            entries[name] = write_file(made / name, [text.encode()])
        listed = {"format": 1, "files": {name: entry._asdict() for name, entry in sorted(entries.items())}}
        write_file(made / FILE_LIST, [json.dumps(listed, indent=1).encode() + b"\n"])


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that gets its name when all is written, and vanishes on an error.

    Raises InputError if `folder` exists and is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists already and is not empty; name a new folder.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if folder.exists():
            # What was for some eyes only stays so.
            partial.chmod(stat.S_IMODE(folder.stat().st_mode))
    except OSError as error:
        raise InputError(f"{partial} cannot be made ({error.strerror}); name a folder that can.") from None
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def shard_names(
    tensors: "Mapping[str, torch.Tensor]", shard_bytes: int, dtype: "torch.dtype | None" = None
) -> list[list[str]]:
    """Names of the tensors of each weight file, in the order in which they are written."""
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
    """Write tensors as `model-00001-of-0000N.safetensors`; yields name and entry of each file.

    Holds one tensor in memory at a time, and none if the tensors are mapped and of the right type.
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
    """Write one safetensors file tensor by tensor; a dtype of None keeps the tensor's own.

    `make` gives the tensors that are on the meta device. The library's own writer makes a copy of the whole
    file in memory.
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
    """Write chunks of bytes to disk for good; gives size and sha256. InputError if the disk refuses."""
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
            f"{file} cannot be written ({error.strerror}); make room or rights for it."
        ) from None
    return FileEntry(size, sha256.hexdigest())


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


@contextmanager
def open_shard(file: Path, framework: str = "np") -> Iterator[Any]:
    """A mapped safetensors file; its names and shapes need no torch, its weights `framework="pt"`.

    Raises InputError if the file is not whole.
    """
    try:
        with safetensors.safe_open(file, framework=framework) as shard:
            yield shard
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{file} is not a whole safetensors file ({error}); copy or convert it again."
        ) from None


def _enumerate(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name on disk and shape of every tensor that a checkpoint for all tasks has."""
    hidden, dim = config.decoder.hidden_size, config.vq.codebook_dim
    yield from _decoder_shapes(config)
    yield "lm_head.weight", (config.decoder.vocab_size, hidden)
    yield from _vision_shapes(config)
    for head in ("gen_image_head", "edit_image_head"):
        yield from _affine(f"{head}.0", hidden, hidden)
        yield f"{head}.2.weight", (config.vq.codebook_size, hidden)
    for adapter in ("gen_input_adapter", "edit_input_adapter", "pixel_adapter"):
        yield from _affine(f"{adapter}.0", hidden, dim)
        yield from _affine(f"{adapter}.2", hidden, hidden)
    yield from _vq_shapes(config)


def _affine(name: str, outputs: int, *inputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, *inputs)
    yield f"{name}.bias", (outputs,)


def _decoder_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    decoder, prefix = config.decoder, "model.language_model"
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    kv = decoder.num_key_value_heads * decoder.head_dim
    yield f"{prefix}.embed_tokens.weight", (decoder.vocab_size, hidden)
    yield f"{prefix}.norm.weight", (hidden,)
    for index in range(decoder.num_hidden_layers):
        layer = f"{prefix}.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for part, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield from _affine(f"{layer}.self_attn.{part}", rows, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)


def _vision_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vision, prefix = config.vision, "model.visual"
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    merged = width * vision.spatial_merge_size**2
    yield (
        f"{prefix}.patch_embed.proj.weight",
        (width, vision.in_channels, vision.temporal_patch_size, patch, patch),
    )
    for index in range(vision.depth):
        block = f"{prefix}.blocks.{index}"
        yield f"{block}.norm1.weight", (width,)
        yield f"{block}.norm2.weight", (width,)
        yield from _affine(f"{block}.attn.qkv", 3 * width, width)
        yield from _affine(f"{block}.attn.proj", width, width)
        yield from _affine(f"{block}.mlp.gate_proj", inner, width)
        yield from _affine(f"{block}.mlp.up_proj", inner, width)
        yield from _affine(f"{block}.mlp.down_proj", width, inner)
    yield f"{prefix}.merger.ln_q.weight", (width,)
    yield from _affine(f"{prefix}.merger.mlp.0", merged, merged)
    yield from _affine(f"{prefix}.merger.mlp.2", vision.out_hidden_size, merged)


def _vq_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vq = config.vq
    widths = [vq.channels * multiplier for multiplier in vq.channel_multipliers]
    yield "vq.quantize.embedding.weight", (vq.codebook_size, vq.codebook_dim)
    yield from _affine("vq.quant_conv", vq.codebook_dim, vq.z_channels, 1, 1)
    yield from _affine("vq.post_quant_conv", vq.z_channels, vq.codebook_dim, 1, 1)
    for coder, levels, blocks, ends, resample in (
        ("vq.encoder", widths, vq.residual_blocks, (3, vq.z_channels), "downsample"),
        ("vq.decoder", widths[::-1], vq.residual_blocks + 1, (vq.z_channels, 3), "upsample"),
    ):
        lowest = 0 if coder == "vq.decoder" else len(levels) - 1
        middle = widths[-1]
        width = middle if coder == "vq.decoder" else vq.channels
        yield from _affine(f"{coder}.conv_in", width, ends[0], 3, 3)
        for index, outputs in enumerate(levels):
            level = f"{coder}.conv_blocks.{index}"
            for block in range(blocks):
                yield from _residual_shapes(f"{level}.res.{block}", width, outputs)
                width = outputs
                if index == lowest:
                    yield from _attention_shapes(f"{level}.attn.{block}", outputs)
            if index < len(levels) - 1:
                yield from _affine(f"{level}.{resample}.conv", outputs, outputs, 3, 3)
        yield from _residual_shapes(f"{coder}.mid.0", middle, middle)
        yield from _attention_shapes(f"{coder}.mid.1", middle)
        yield from _residual_shapes(f"{coder}.mid.2", middle, middle)
        yield from _affine(f"{coder}.norm_out", width)
        yield from _affine(f"{coder}.conv_out", ends[1], width, 3, 3)


def _residual_shapes(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield from _affine(f"{name}.norm1", inputs)
    yield from _affine(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _affine(f"{name}.norm2", outputs)
    yield from _affine(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _affine(f"{name}.nin_shortcut", outputs, inputs, 1, 1)


def _attention_shapes(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield from _affine(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from _affine(f"{name}.{part}", channels, channels, 1, 1)
