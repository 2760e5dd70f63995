"""Weights that several readers put into their places, on a CPU: the same ones as one reader's."""

import functools
from pathlib import Path

import pytest
import torch

from wallaroo.model.checkpoint import TINY, disk_tensors, empty_model, load, load_config, save
from wallaroo.model.cuda.loading import fill
from wallaroo.model.errors import InputError
from wallaroo.model.weight_files import open_shard

OPENED = functools.partial(open_shard, framework="pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights") / "sharded"
    save(load(TINY), load_config(TINY), (TINY / "tokenizer.json").read_text(), made, shard_bytes=500_000)
    return made


def files_of(folder: Path) -> dict[Path, list[str]]:
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_shard(file) as shard:
            files[file] = list(shard.keys())
    return files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", ["generate", "edit", "understand"])
@pytest.mark.parametrize("chunk_bytes", [4096, 1 << 20])
def test_all_tensors_come_to_their_places(
    folder: Path, task: str, dtype: torch.dtype, chunk_bytes: int
) -> None:
    model = empty_model(load_config(folder), task, "cpu", dtype)
    places = disk_tensors(model)
    for place in places.values():
        place.fill_(torch.nan)
    fill(places, files_of(folder), OPENED, chunk_bytes, task_bytes=100_000)
    expected = disk_tensors(load(folder, task, dtype=dtype))
    assert places.keys() == expected.keys()
    for name, place in places.items():
        assert place.dtype == expected[name].dtype and torch.equal(place, expected[name]), name


def test_what_a_reader_cannot_read_is_raised(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder)
    broken = tmp_path / "broken.safetensors"
    file, names = next(iter(files.items()))
    broken.write_bytes(file.read_bytes()[:-100])
    places = disk_tensors(empty_model(load_config(folder), None, "cpu", torch.float32))
    with pytest.raises(InputError, match="not a complete safetensors file"):
        fill(places, {broken: names} | files, OPENED)
