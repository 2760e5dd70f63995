"""Folders of stock Qwen2.5-VL: reading one as the backbone, and writing one with Wallaroo's weights.

Knows nothing of Wallaroo's published files, nor of how the model computes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wallaroo.model.errors import InputError
from wallaroo.model.images import FRAMES, MEAN, MERGE, PATCH, STD
from wallaroo.model.new_folder import new_folder
from wallaroo.model.tensor_shapes import Shape, compare_shapes
from wallaroo.model.weight_files import DTYPES, open_shard, write_safetensors

if TYPE_CHECKING:
    import torch

PREPROCESSOR_FILE = "preprocessor_config.json"

PIXELS = (3136, 12845056)
"""Least and most pixels of a picture by Qwen2.5-VL-7B-Instruct, where its folder does not say."""

_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}

_README = """# Wallaroo, understanding only

The language model and the vision tower of a Wallaroo checkpoint, in the layout of Qwen2.5-VL. The model
answers questions about images. The parts that make and edit images are left out.

Written by `wallaroo convert --understanding-only`. The weights are from `{source}`; all other files, the
license included, are from `{backbone}`.

## Load

```python
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

model = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
```

`AutoProcessor` also loads a processor of videos, which needs torchvision. Install the torchvision that
belongs to the installed torch, in release and build (CPU or CUDA). Without it, load `AutoTokenizer` and
`Qwen2VLImageProcessorPil`. That one scales images by Pillow, as `wallaroo understand` does. The one that
`AutoProcessor` loads scales by torchvision, which rounds differently; replace it for equal pixels:

```python
from transformers import Qwen2VLImageProcessorPil

processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
```

## Image limits

Images are scaled to multiples of 28 pixels per side, to {least:,} pixels at least and {most:,} at most, as
`{preprocessor}` says. Answers depend on these limits. `wallaroo understand` has {own_least:,} to
{own_most:,} by default, as in training. Give equal limits for equal answers:

| limits | in transformers | in Wallaroo |
|---|---|---|
| of this folder | none needed | `--min-pixels {least} --max-pixels {most}` |
| of the training | `min_pixels={own_least}, max_pixels={own_most}` to `from_pretrained` | none needed |
| of VLMEvalKit | set by VLMEvalKit | `--preset vlmevalkit` |
"""


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file of a backbone folder.

    Raises:
        InputError: The file cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); the backbone must be a folder of Qwen2.5-VL-7B-Instruct."
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{file} must hold a JSON object, not a {type(values).__name__}.")
    return values


def check_preprocessor(values: dict[str, Any], backbone: Path) -> None:
    """Checks that a backbone prepares pictures as this program does.

    Args:
        values: What the folder says of its preparation of pictures.
        backbone: The folder, for the message.

    Raises:
        InputError: It prepares them in another way.
    """
    ours = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": MEAN.tolist(),
        "image_std": STD.tolist(),
    }
    for name, ours_is in ours.items():
        value = values.get(name, ours_is)
        same = value == ours_is
        if isinstance(ours_is, list) and isinstance(value, list) and len(value) == len(ours_is):
            same = all(
                isinstance(a, int | float) and abs(a - b) < 1e-6 for a, b in zip(value, ours_is, strict=True)
            )
        if not same:
            raise InputError(
                f"{backbone / PREPROCESSOR_FILE}: {name} is {value!r:.100}, but images are "
                f"prepared with {ours_is}."
            )


def stock_files(backbone: Path) -> dict[str, dict[str, tuple[Shape, str]]]:
    """File -> tensor -> (shape, type) of a backbone folder's weights, each tensor of its index there."""
    found: dict[str, dict[str, tuple[Shape, str]]] = {}
    for file in sorted(backbone.glob("*.safetensors")):
        with open_shard(file) as shard:
            pieces = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            found[file.name] = {
                name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in pieces.items()
            }
    index = backbone / "model.safetensors.index.json"
    places = read_json(index).get("weight_map") if index.exists() else None
    if places is not None and places != {name: file for file, names in found.items() for name in names}:
        raise InputError(
            f"{index} does not name the tensors that are in {backbone}; download the whole folder again."
        )
    for file_name, stored in found.items():
        for name, (_, code) in stored.items():
            if code not in DTYPES:
                raise InputError(
                    f"{backbone / file_name} holds '{name}' as {code}; give the published folder."
                )
    if not found:
        raise InputError(f"The backbone {backbone} has no safetensors files to take names and shapes from.")
    return found


def from_stock(name: str) -> str:
    """Our name of a tensor of a stock folder, in the published naming or that of newer transformers."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + name.removeprefix("model.")
    return name


def write_stock(
    tensors: "Mapping[str, torch.Tensor]",
    backbone: Path,
    output: str | Path,
    source: str,
    pixels: tuple[int, int],
    overwrite: bool = False,
) -> None:
    """Copies a backbone folder with other weights in place of its own: same files, names, shapes, types.

    Its README is replaced, and its limits of pictures are written out where it leaves them to the reader.

    Args:
        tensors: By our names, those of the language model and the vision tower alone.
        backbone: The folder to copy.
        output: Folder to write, which must not exist yet or be empty, unless it may overwrite.
        source: Where the tensors are from, for messages and the README.
        pixels: Least and most pixels of a picture in the training of the tensors, for the README.
        overwrite: Whether `output` may hold files, see `wallaroo.model.new_folder`.

    Raises:
        InputError: Tensors are missing, unexpected or wrong-shaped, or the backbone is no whole folder.
    """
    import torch

    files = stock_files(backbone)
    expected = {from_stock(name): shape for stored in files.values() for name, (shape, _) in stored.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(shapes, expected, f"{source} beside the backbone {backbone}")
    with new_folder(output, overwrite) as folder:
        for file in sorted(backbone.iterdir()):
            if file.is_file() and file.suffix not in _WEIGHT_FILES:
                shutil.copyfile(file, folder / file.name)
        least, most, said_by = _limit_pixels(folder, backbone)
        text = _README.format(
            source=Path(source).name,
            backbone=backbone.resolve().name,
            preprocessor=said_by,
            least=least,
            most=most,
            own_least=pixels[0],
            own_most=pixels[1],
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
        for file_name, stored in files.items():
            kinds = {name: getattr(torch, DTYPES[code]) for name, (_, code) in stored.items()}
            write_safetensors(folder / file_name, {name: tensors[from_stock(name)] for name in stored}, kinds)


def _limit_pixels(folder: Path, backbone: Path) -> tuple[int, int, str]:
    """Least and most pixels of a picture by a file of a new folder, which says them from now on; its name."""
    # transformers reads this one first, where it describes the preparation of pictures.
    file = folder / "processor_config.json"
    whole = read_json(file) if file.exists() else {}
    values = whole.get("image_processor")
    if not isinstance(values, dict):
        file = folder / PREPROCESSOR_FILE
        whole = values = read_json(file) if file.exists() else {}
        values.setdefault("image_processor_type", "Qwen2VLImageProcessor")
    check_preprocessor(values, backbone)
    size = values.get("size")
    size = size if isinstance(size, dict) else {}
    least = values.get("min_pixels") or size.get("shortest_edge") or PIXELS[0]
    most = values.get("max_pixels") or size.get("longest_edge") or PIXELS[1]
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        raise InputError(
            f"{backbone / file.name}: images have {least!r:.50} to {most!r:.50} pixels, but the limits "
            "must be two increasing whole numbers; download the folder again."
        )
    values |= {"min_pixels": least, "max_pixels": most}
    file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return least, most, file.name
