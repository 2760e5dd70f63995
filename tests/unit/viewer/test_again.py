"""The command that repeats a row, and the sources of a row."""

import itertools
import json
import shlex
import subprocess

import pyarrow as pa

from wallaroo.workflows.outputs import layout
from wallaroo.workflows.plans.columns import GIVEN
from wallaroo.workflows.viewer import again


def test_recipe_writes_the_row_and_names_the_run(three, opened, tmp_path):
    output = opened(three, fill=False)
    output.run["options"].update(
        model="my models/7b",
        image_format="webp",
        image_quality=90,
        cfg_interval=[0.0, 0.5],
        threads=2,
        templates={"en": "Draw 'it': {prompt}"},
    )
    row = output.row(0, 1) | {"prompt": "it's\n$HOME `x` \\ 袋鼠 END"}
    made = again.recipe(output, row)
    before, _, command = made.command.rpartition("\n")
    subprocess.run(["bash", "-c", before], cwd=tmp_path, check=True)
    line = json.loads((tmp_path / "again.jsonl").read_text())
    names = ("id", "prompt", "seed", "cfg", "temperature", "top_k", "top_p", "language", "width", "height")
    assert line == {name: row[name] for name in names}
    assert shlex.split(command) == [
        "wallaroo", "generate", "again.jsonl", "out/again",
        "--model", "my models/7b", "--template-en", "Draw 'it': {prompt}",
        "--image-format", "webp", "--image-quality", "90", "--cfg-interval", "0:0.5", "--threads", "2",
    ]  # fmt: skip


def test_recipe_is_of_options_that_the_command_has(three, opened):
    """Every flag that a recipe can name is one of the command, with the value it takes."""
    from wallaroo.jobs.config import resolve
    from wallaroo.workflows.settings import OPTIONS

    flags = {one.flag for one in OPTIONS.values()}
    output = opened(three, fill=False)
    config = resolve("edit", "m.jsonl", "out", {"model": "x", "image_format": "jpeg", "image_quality": 80,
        "restore_size": True, "max_prompt_tokens": 9, "max_source_bytes": 5, "max_source_pixels": 6,
        "allow_https": True, "cfg_interval": "0:0.5",
        "template_zh": "{prompt}", "threads": 3}, (), None, {})  # fmt: skip
    output.run["options"].clear()
    output.run["options"].update(config.to_dict())
    words = shlex.split(again.recipe(output, output.row(0, 0)).command.rpartition("\n")[2])
    given = dict(itertools.pairwise(words))
    named = {word for word in words if word.startswith("--")}
    assert named <= flags and len(named) == 11
    assert given["--max-prompt-tokens"] == "9" and given["--cfg-interval"] == "0:0.5"


def test_no_recipe_where_the_weights_were_of_8_bits(three, opened):
    output = opened(three, fill=False)
    assert again.recipe(output, output.row(0, 0)) is not None
    output.run["options"]["weights"] = "int8"
    assert again.recipe(output, output.row(0, 0)) is None


def test_error_row_shows_its_row_of_the_manifest(three, opened):
    output = opened(three, fill=False)
    line = json.loads(again.recipe(output, output.row(1, 5)).manifest)
    assert line["id"] == "p22" and line["tag"] == "t5" and line["include"] == [{"class": "cat"}]
    assert "kind" not in line and "message" not in line


def test_a_refused_row_is_repeated_as_it_was_given(tmp_path, outputs, opened):
    table = outputs.plan_table(rows=6, errors=(0, 1))
    given = [json.dumps({"cfg": "much", "seed": None})] * 2 + [None] * 4
    outputs.make_output(tmp_path / "out", [table.append_column(GIVEN, pa.array(given))])
    output = opened(tmp_path / "out", fill=False)
    line = json.loads(again.recipe(output, output.row(0, 0)).manifest)
    assert (line["id"], line["cfg"]) == ("p0", "much") and "seed" not in line


def test_lineage_goes_through_outputs_to_the_manifest(tmp_path, outputs, opened):
    first = tmp_path / "first"
    outputs.make_output(first, [outputs.plan_table(6)])
    path = first / "run.json"
    document = json.loads(path.read_text())
    document["options"]["manifest"] = "prompts.jsonl"
    path.write_text(json.dumps(document))
    shard = layout.shard_path(str(first), 0)

    def source(number):
        return {"source": {"uri": shard, "row_id": number}}

    outputs.make_task_output(tmp_path / "second", "edit", more=source)
    output = opened(tmp_path / "second", fill=False)
    steps = again.lineage(output, output.row(0, 4))
    assert [(step.kind, step.where) for step in steps] == [
        ("generate", str(first)),
        ("manifest", "prompts.jsonl"),
    ]
    assert (steps[0].name, steps[0].shard, steps[0].position) == ("p2", 0, 4)
    plain = tmp_path / "third"
    outputs.make_task_output(plain, "edit")
    output = opened(plain, fill=False)
    (step,) = again.lineage(output, output.row(0, 0))
    assert (step.kind, step.where) == ("image", str(tmp_path / "sources" / "s0.png"))
