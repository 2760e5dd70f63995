"""What a plan says and how it is laid out, without a manifest or Ray."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from wallaroo.model.checkpoint import TINY, load_config
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.plans.checks import check_same
from wallaroo.workflows.plans.counts import _repeated
from wallaroo.workflows.plans.layout import shard_rows
from wallaroo.workflows.plans.plan import Plan, PlanPart, Round, read_plan, read_shard
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.settings import RunConfig

PART = PlanPart(
    part=0,
    file="part-00000-x.parquet",
    round=0,
    first_row_id=0,
    rows=20,
    first_shard=0,
    shards=3,
    shard_rows=8,
    error_rows=2,
    errors={"size": 2},
    sizes={"128x64": 17, "96x96": 1},
    complete=False,
)
NEXT = dataclasses.replace(PART, part=1, first_row_id=20, first_shard=3, errors={"prompt": 2}, complete=True)
OPENING = Round(
    rows=40,
    shard_rows=8,
    selected=np.array([True, False, True] * 7),
    settings={"seed": 0},
    model_digest="m",
    manifest=[["a.csv", 5, "e"]],
    carried=pa.schema([("tag", pa.string())], metadata={b"wallaroo.json": b'["tag"]'}),
    warnings=["one"],
)


def write(folder, part, opening=None, **changes):
    (folder / "plan").mkdir(exist_ok=True)
    values = {"format": 1, **dataclasses.asdict(part), **changes}
    if opening:
        values["opening"] = opening.to_values()
    (folder / "plan" / f"part-{part.part:05d}.json").write_text(json.dumps(values))


def test_nothing_planned_is_a_plan_too(tmp_path):
    plan = read_plan(str(tmp_path))
    assert plan == Plan() and not plan.complete
    assert (plan.rows, plan.shards, plan.errors, plan.sizes, plan.warnings) == (0, range(0), {}, {}, [])
    assert plan.carried == pa.schema([])


def test_a_plan_adds_its_parts_up(tmp_path):
    write(tmp_path, PART, OPENING)
    assert not read_plan(str(tmp_path)).complete
    write(tmp_path, NEXT)
    (tmp_path / "plan" / "part-00002-x.parquet").write_bytes(b"of a part that is not valid yet")
    plan = read_plan(str(tmp_path))
    assert plan.parts == (PART, NEXT) and plan.complete
    assert (plan.rows, plan.shards, plan.error_rows) == (40, range(6), 4)
    assert plan.errors == {"size": 2, "prompt": 2}
    assert {(size.height, size.width): rows for size, rows in plan.sizes.items()} == {
        (64, 128): 34,
        (96, 96): 2,
    }
    assert plan.carried.equals(OPENING.carried, check_metadata=True) and plan.warnings == ["one"]
    assert plan.rounds[0].selected.tolist() == OPENING.selected.tolist()


def test_a_round_comes_back_as_it_was():
    again = Round.from_values(json.loads(json.dumps(OPENING.to_values())))
    for field in dataclasses.fields(Round):
        assert np.array_equal(getattr(again, field.name), getattr(OPENING, field.name)), field.name
    assert again.shards == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "another version"),
        ({"surprise": 1}, "cannot be read"),
        ({"first_shard": 2}, "does not follow"),
        ({"first_row_id": 0}, "does not follow"),
    ],
)
def test_a_plan_that_cannot_be_understood_is_refused(tmp_path, changes, words):
    write(tmp_path, PART, OPENING)
    write(tmp_path, NEXT, **changes)
    with pytest.raises(InputError, match=words):
        read_plan(str(tmp_path))


def test_a_gap_or_a_broken_file_is_refused(tmp_path):
    write(tmp_path, NEXT)
    with pytest.raises(InputError, match=r"part-00001\.json does not follow"):
        read_plan(str(tmp_path))
    (tmp_path / "plan" / "part-00000.json").write_text('{"format": 1, "pa')
    with pytest.raises(InputError, match=r"part-00000\.json cannot be read"):
        read_plan(str(tmp_path))


def test_a_shard_without_a_plan_is_one_sentence(tmp_path):
    write(tmp_path, PART, OPENING)
    with pytest.raises(InputError, match="no plan for shard 3"):
        read_shard(str(tmp_path), 3)
    with pytest.raises(InputError, match=r"part-00000-x\.parquet is missing"):
        read_shard(str(tmp_path), 0)


def test_a_shard_grows_with_the_rows_up_to_its_bounds():
    tiny = load_config(TINY)
    assert [shard_rows(rows, tiny) for rows in (1, 256, 257, 3200, 8192, 10**7)] == [8, 8, 9, 100, 256, 256]
    # The published model's largest pictures have 512x512 pixels.
    assert shard_rows(10**7, ModelConfig()) == 256
    assert shard_rows(10**7, ModelConfig(sizes={"1.0": (1024, 1024)})) == 64
    assert shard_rows(10**7, ModelConfig(sizes={"1.0": (8192, 8192)})) == 1


def test_repeated_hashes_are_all_found():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**63, 5000, dtype=np.uint64)
    assert _repeated(hashes).tolist() == [] and _repeated(hashes[:0]).tolist() == []
    hashes[[17, 4000, 4999]] = hashes[3]
    hashes[0] = hashes[1]
    assert _repeated(hashes).tolist() == [0, 1, 3, 17, 4000, 4999]


def test_a_changed_manifest_is_refused_with_the_command_that_retries_failed_rows(tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    output.mkdir()
    (photos / "broken.jpg").write_bytes(b"no image")
    settings = PlanSettings.of(RunConfig(str(photos), str(output), task="understand", prompt="What is it?"))
    found = discover(str(photos), "understand", None)
    opening = dataclasses.replace(OPENING, settings=settings.meaning(), manifest=found.identity())
    plan = Plan((PART, NEXT), (opening,))
    check_same(plan, found, settings, "m", str(output))
    (photos / "broken.jpg").write_bytes(b"the repaired image")
    changed = discover(str(photos), "understand", None)
    begin = f"The manifest {photos} is not the one that was planned (changed: pictures): restore it"
    with pytest.raises(InputError) as caught:
        check_same(plan, changed, settings, "m", str(output))
    assert str(caught.value) == f"{begin} or give another output."
    (output / "errors.jsonl").write_text("{}\n")
    with pytest.raises(InputError) as caught:
        check_same(plan, changed, settings, "m", str(output))
    assert str(caught.value) == (
        f"{begin}, give another output, or retry the failed rows with "
        f"`wallaroo understand {output}/errors.jsonl NEW_OUTPUT`."
    )
