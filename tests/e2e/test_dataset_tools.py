"""Expanding prompts and choosing rows from and to S3: the same as on local paths."""

import hashlib
import json

import pyarrow.parquet as pq

from wallaroo.workflows import storage
from wallaroo.workflows.datasets.rules import Rules
from wallaroo.workflows.datasets.select import select
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.expand import expand, read_list
from wallaroo.workflows.outputs import layout


def files(folder):
    """Relative path -> sha256 of all files below a folder, local or on S3."""
    listed = storage.list_files(str(folder))
    return {one.relative: hashlib.sha256(storage.read_bytes(one.path)).hexdigest() for one in listed}


def test_prompts_are_expanded_on_s3(s3, tmp_path):
    storage.write_atomic(f"{s3}/colours.txt", b"red\nblue\n")
    lists = {"colour": read_list(f"{s3}/colours.txt"), "animal": ["cat", "dog"]}
    for folder in (f"{s3}/prompts", str(tmp_path / "prompts")):
        assert expand(["a {colour} {animal}"], lists, f"{folder}/a.jsonl") == 4
        assert expand(["a {colour} {animal}"], lists, f"{folder}/a.parquet", sample=2) == 2
    assert files(f"{s3}/prompts") == files(tmp_path / "prompts")
    assert len(discover(f"{s3}/prompts").files) == 2


def test_rows_are_chosen_from_and_to_s3(s3, tmp_path):
    lines = [{"id": f"p{n // 3}", "prompt": f"cat {n}", "score": n % 3} for n in range(300)]
    storage.write_atomic(f"{s3}/m/prompts.jsonl", "\n".join(map(json.dumps, lines)).encode())
    rules = Rules(best_of="score", split={"train": 0.8, "test": 0.2})
    found = select(f"{s3}/m", f"{s3}/chosen", rules)
    assert (found.kept, found.dropped) == (100, {"not the best": 200})
    assert select(f"{s3}/m", str(tmp_path / "chosen"), rules) == found
    assert files(f"{s3}/chosen") == files(tmp_path / "chosen")
    kept = []
    for split in found.splits:
        filesystem, inner = storage.parquet_filesystem(f"{s3}/chosen/{split}")
        kept += pq.read_table(inner, filesystem=filesystem).to_pylist()
    assert {row["prompt"] for row in kept} == {f"cat {n}" for n in range(2, 300, 3)}
    assert select(f"{s3}/m", f"{s3}/chosen", rules) == found
    assert layout.DATA_FOLDER not in found.splits
