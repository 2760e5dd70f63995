"""Planning with Ray: every row once and in order, whatever the files, looks, interruptions and races."""

import csv
import json
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.model.checkpoint import TINY
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.plans import rounds
from wallaroo.workflows.plans.plan import read_plan, read_shard
from wallaroo.workflows.plans.planner import make_plan
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.settings import RunConfig

pytestmark = pytest.mark.usefixtures("local_ray")

MODEL = str(TINY)


def make(manifest, output=None, **settings):
    return make_plan(
        str(manifest), PlanSettings.of(RunConfig("", "", **settings)), MODEL, output and str(output)
    )


def shards(output):
    return [read_shard(str(output), shard) for shard in read_plan(str(output)).shards]


def rows(output):
    """All planned rows as dicts, after a check of what holds for every plan."""
    plan, tables = read_plan(str(output)), shards(output)
    assert plan.complete and len(tables) == len(plan.shards)
    for number, table in enumerate(tables):
        assert set(table["shard"].to_pylist()) == {number}
        part = next(part for part in plan.parts if number < part.first_shard + part.shards)
        last = number == part.first_shard + part.shards - 1
        assert table.num_rows == part.shard_rows or (last and table.num_rows < part.shard_rows)
    found = pa.concat_tables(tables).to_pylist()
    assert [row["row_id"] for row in found] == list(range(plan.rows))
    assert sum(row["status"] == "error" for row in found) == plan.error_rows == sum(plan.errors.values())
    assert sum(plan.sizes.values()) == plan.rows - plan.error_rows
    assert len({(row["id"], row["sample"]) for row in found if row["status"] == "planned"}) == sum(
        row["status"] == "planned" for row in found
    )
    return found


@pytest.fixture
def mixed(tmp_path):
    """A manifest of three formats with faults, samples and ids that occur twice; and what it should give."""
    folder = tmp_path / "manifest"
    folder.mkdir()
    wanted = []
    with open(folder / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "samples", "tag"])
        for number in range(100):
            samples = number % 4 if number != 50 else 40
            prompt = "" if number % 10 == 7 else f"cat {number}"
            writer.writerow([f"a{number}", prompt, samples or "", f"t{number}"])
            status = "prompt" if number % 10 == 7 else ""
            wanted += [(f"a{number}", sample, status) for sample in range(samples or 2)]
    with open(folder / "b.jsonl", "w") as file:
        for number in range(60):
            if number == 13:
                file.write("{nope\n")
                wanted.append(("b.jsonl:13", 0, "manifest"))
                continue
            row = {"id": f"b{number}", "prompt": f"dog {number}"}
            if number == 20:
                row |= {"id": "a5", "samples": 3}
            if number == 21:
                row |= {"id": "b3"}
            file.write(json.dumps(row) + "\n")
            wanted += (
                [(row["id"], 0, "id")] if number in (20, 21) else [(f"b{number}", s, "") for s in range(2)]
            )
    ids = [f"c{number}" for number in range(200)]
    ids[150] = "a5"
    table = pa.table({"id": ids, "prompt": [f"bird {number}" for number in range(200)]})
    pq.write_table(table, folder / "c.parquet", row_group_size=50)
    wanted += [(i, s, "id" if i == "a5" else "") for i in ids for s in range(1 if i == "a5" else 2)]
    return folder, wanted


def told(found):
    return [(row["id"], row["sample"], row["error_type"]) for row in found]


def test_every_row_is_planned_once_and_in_order(mixed, tmp_path, monkeypatch):
    folder, wanted = mixed
    make(folder, tmp_path / "one", samples=2)
    found = rows(tmp_path / "one")
    assert told(found) == wanted
    assert [row["tag"] for row in found[:3]] == ["t0", "t0", "t1"] and found[-1]["tag"] is None
    # Parts that end within a file, a piece and the samples of a row change nothing but where rows lie.
    monkeypatch.setattr(rounds, "PART_SHARDS", 1)
    plan = make(folder, tmp_path / "many", samples=2)
    assert len(plan.parts) == len(plan.shards) > 20
    assert rows(tmp_path / "many") == found


def test_a_plan_without_an_output_counts_the_same(mixed, tmp_path):
    folder, wanted = mixed
    there = make(folder, tmp_path / "out", samples=2)
    here = make(folder, samples=2)
    assert here.parts == there.parts and here.rows == len(wanted)


def test_a_second_call_does_nothing(mixed, tmp_path):
    folder, _ = mixed
    first = make(folder, tmp_path / "out", samples=2)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "plan").iterdir()}
    second = make(folder, tmp_path / "out", samples=2)
    assert second.parts == first.parts
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "plan").iterdir()} == kept


def test_an_interrupted_plan_goes_on_as_it_began(mixed, tmp_path, monkeypatch):
    folder, _ = mixed
    monkeypatch.setattr(rounds, "PART_SHARDS", 5)
    make(folder, tmp_path / "whole", samples=2)
    wanted = rows(tmp_path / "whole")
    parts = len(read_plan(str(tmp_path / "whole")).parts)
    assert parts > 3
    for kept in range(parts):
        shutil.copytree(tmp_path / "whole", tmp_path / str(kept))
        for part in range(kept, parts):
            (tmp_path / str(kept) / "plan" / f"part-{part:05d}.json").unlink()
        if kept % 2:
            for file in (tmp_path / str(kept) / "plan").glob(f"part-{kept:05d}-*.parquet"):
                file.write_bytes(file.read_bytes()[:100])
        make(folder, tmp_path / str(kept), samples=2)
        assert rows(tmp_path / str(kept)) == wanted


def test_looks_come_first_and_are_not_planned_again(mixed, tmp_path):
    folder, wanted = mixed
    out = tmp_path / "out"
    looks = [{"limit": 10}, {"limit": 10}, {"limit": 30}, {"where": "prompt LIKE 'bird 15%'"}, {}]
    counts = [make(folder, out, samples=2, **look).rows for look in looks]
    assert counts[0] == counts[1] < counts[2] < counts[3] < counts[4]
    found = rows(out)
    # The look at c150 made it the first to have the id a5, but a5 of a.csv was in an earlier look still.
    assert sorted(told(found)) == sorted(wanted)
    assert told(found[: counts[0]]) == wanted[: counts[0]]
    assert {row["id"] for row in found[counts[2] : counts[3]]} == {
        "c15",
        "a5",
        *(f"c15{n}" for n in range(1, 10)),
    }
    assert make(folder, out, samples=2).rows == counts[4]


def test_the_first_to_be_planned_keeps_its_id(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(
        "".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in (("x", "a"), ("x", "b")))
    )
    make(manifest, tmp_path / "out", where="prompt = 'b'")
    make(manifest, tmp_path / "out")
    assert [(row["prompt"], row["error_type"]) for row in rows(tmp_path / "out")] == [("b", ""), ("a", "id")]


def test_an_interrupted_look_is_finished_before_another(mixed, tmp_path, monkeypatch):
    folder, wanted = mixed
    monkeypatch.setattr(rounds, "PART_SHARDS", 2)
    # By chance, so that only what is written down tells which rows were chosen. An id that occurs twice is
    # kept by the first row of it that is planned, so those are left to the last of the three.
    make(folder, tmp_path / "out", samples=2, where="random() < 0.5 AND id NOT IN ('a5', 'b3')")
    chosen = rows(tmp_path / "out")
    for file in sorted((tmp_path / "out" / "plan").glob("part-?????.json"))[1:]:
        file.unlink()
    make(folder, tmp_path / "out", samples=2, limit=1)
    assert rows(tmp_path / "out")[: len(chosen)] == chosen
    make(folder, tmp_path / "out", samples=2)
    assert sorted(told(rows(tmp_path / "out"))) == sorted(wanted)


def test_planners_who_race_plan_every_row_once(mixed, tmp_path, monkeypatch):
    folder, wanted = mixed
    monkeypatch.setattr(rounds, "PART_SHARDS", 3)
    # Of the rows of one id, the one of the first round counts; a5 is left out where that could be either.
    looks = [{}, {"limit": 40}, {"where": "prompt LIKE 'dog%' AND id != 'a5'"}]
    failures = []

    def plan(look):
        try:
            make(folder, tmp_path / "out", samples=2, **look)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=plan, args=(look,)) for look in looks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(told(rows(tmp_path / "out"))) == sorted(wanted)


def test_s3_and_local_plans_are_the_same(mixed, tmp_path, s3):
    folder, _ = mixed
    make(folder, tmp_path / "out", samples=2)
    for file in folder.iterdir():
        storage.write_atomic(f"{s3}/manifest/{file.name}", file.read_bytes())
    make(f"{s3}/manifest", f"{s3}/out", samples=2)
    assert rows(f"{s3}/out") == rows(tmp_path / "out")
    make(f"{s3}/manifest/*.parquet", f"{s3}/some", samples=2)
    assert {row["id"][0] for row in rows(f"{s3}/some")} == {"c", "a"}


def test_carried_columns_have_one_type_in_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "PART_SHARDS", 1)
    values = [[{"position": ["right of", 0]}], [], None, [{"class": "cow", "count": 1}]]
    lines = [json.dumps({"prompt": f"p{n}", "tag": f"t{n}", "include": values[n % 4]}) for n in range(40)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    plan = make(tmp_path / "m.jsonl", tmp_path / "out")
    schemas = {table.schema.to_string() for table in shards(tmp_path / "out")}
    assert len(schemas) == 1
    assert plan.carried == pa.schema([("tag", pa.string()), ("include", pa.string())])
    assert json.loads(plan.carried.metadata[b"wallaroo.json"]) == ["include"]
    found = rows(tmp_path / "out")
    assert [row["include"] and json.loads(row["include"]) for row in found] == [
        values[n % 4] for n in range(40)
    ]
    assert [row["id"] for row in found] == [f"m.jsonl:{n}" for n in range(40)]


def test_warnings_are_kept_with_the_plan(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "m.csv").write_text("prompt,sede\ncat,1\n")
    (folder / "notes.txt").write_text("")
    make(folder, tmp_path / "out")
    warnings = read_plan(str(tmp_path / "out")).warnings
    assert ["notes.txt" in one for one in warnings] == [True, False] and "'seed'" in warnings[1]


def damaged(folder):
    pq.write_table(pa.table({"prompt": [f"prompt {n}" for n in range(9000)]}), folder / "good.parquet")
    data = (folder / "good.parquet").read_bytes()
    (folder / "bad.parquet").write_bytes(data[:2000] + bytes(500) + data[2500:])


@pytest.mark.parametrize(
    ("prepare", "settings", "words"),
    [
        (lambda m: (m / "a.csv").write_text("prompt\n"), {}, "has no rows: correct it"),
        (lambda m: (m / "a.csv").write_text(""), {}, "has no rows: correct it"),
        (lambda m: (m / "a.csv").write_text("promt\nx\n"), {}, "no column 'prompt'; did you mean 'promt'"),
        (
            lambda m: (m / "a.csv").write_text("prompt\nx\n"),
            {"where": "false"},
            "has no row that matches --where",
        ),
        (lambda m: (m / "a.csv").write_text("prompt\nx\n"), {"where": "promt = 'x'"}, "DuckDB refuses"),
        (lambda m: (m / "a.csv").write_text("prompt\nx\n"), {"where": "prompt::int = 1"}, "DuckDB refuses"),
        (lambda m: (m / "a.parquet").write_bytes(b"PAR1"), {}, r"a\.parquet is not a readable parquet file"),
        (damaged, {}, r"bad\.parquet is not a readable parquet file"),
        (lambda m: None, {}, "the folder is empty"),
    ],
)
def test_a_fault_of_the_run_is_one_sentence_and_leaves_no_plan(tmp_path, prepare, settings, words):
    (tmp_path / "m").mkdir()
    prepare(tmp_path / "m")
    with pytest.raises(InputError, match=words) as caught:
        make(tmp_path / "m", tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not list(Path(tmp_path).glob("out/plan/*.json"))


def test_a_plan_goes_on_with_its_own_manifest_and_settings_only(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt\nx\n")
    out = tmp_path / "out"
    make(folder, out)
    with pytest.raises(
        InputError,
        match=r"seed is 0 in the plan and 1 in this run; cfg is 3.0 in the plan and 2.0 in this run",
    ):
        make(folder, out, seed=1, cfg=2.0)
    (folder / "a.csv").write_text("prompt\ny\n")
    (folder / "b.csv").write_text("prompt\nz\n")
    with pytest.raises(InputError, match=r"\(new: b\.csv; changed: a\.csv\): restore it or"):
        make(folder, out)
    with pytest.raises(InputError, match="is inside the manifest"):
        make(folder, folder / "out")


def test_questions_about_one_prompt_are_one_row(tmp_path):
    """The table of DPG-Bench: a row for each question about the pictures of an item."""
    questions = [
        ("partiprompts5", '"A red cube."'),
        ("COCOval74", "A dog."),
        ("partiprompts5", '"A red cube."'),
    ]
    lines = [
        {
            "item_id": item,
            "text": text,
            "proposition_id": number,
            "question_natural_language": f"Is it {number}?",
        }
        for number, (item, text) in enumerate(questions * 30, 1)
    ]
    lines.append(lines[0] | {"text": "Another prompt."})
    manifest = tmp_path / "dpg_bench.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    made = make(manifest, tmp_path / "out", preset="dpg")
    found = rows(tmp_path / "out")
    assert [(row["id"], row["prompt"], row["sample"], row["error_type"]) for row in found] == [
        *(("partiprompts5", "A red cube.", sample, "") for sample in range(4)),
        *(("COCOval74", "A dog.", sample, "") for sample in range(4)),
        ("partiprompts5", "Another prompt.", 0, "id"),
    ]
    assert [row["proposition_id"] for row in found] == ["1"] * 4 + ["2"] * 4 + ["1"]
    joined = "Rows with the id and prompt of an earlier row are joined with it: 88."
    assert joined in made.warnings
    # Looks at the first rows plan the same rows, in shards of their own.
    for limit in (1, 2, 90, None):
        make(manifest, tmp_path / "looked", preset="dpg", limit=limit)
    assert [row | {"shard": 0} for row in rows(tmp_path / "looked")] == [row | {"shard": 0} for row in found]
    # Elsewhere it takes a column of ids that the run names, and only equal rows are joined.
    other = tmp_path / "tifa.jsonl"
    tifa = [("a", "x", 1), ("b", "y", 1), ("a", "x", 1), ("b", "y", 2)]
    other.write_text("".join(json.dumps({"id": i, "caption": c, "seed": s}) + "\n" for i, c, s in tifa))
    make(other, tmp_path / "named", id_column="id", prompt_column="caption")
    found = rows(tmp_path / "named")
    assert [(row["id"], row["seed"], row["error_type"]) for row in found] == [
        ("a", 1, ""),
        ("b", 1, ""),
        ("b", 2, "id"),
    ]
    make(other, tmp_path / "plain", prompt_column="caption")
    assert [row["error_type"] for row in rows(tmp_path / "plain")] == ["", "", "id", "id"]
