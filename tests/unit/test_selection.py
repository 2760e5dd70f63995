"""Choosing rows: each rule alone and together, over outputs and manifests, and nothing lost unsaid."""

import hashlib
import json
import shutil
import sys
import types
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets import decide, look, progress
from wallaroo.workflows.datasets import rules as datasets_rules
from wallaroo.workflows.datasets.export import export
from wallaroo.workflows.datasets.rules import Rules, dhash, load_function
from wallaroo.workflows.datasets.select import select
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.outputs import layout, shards
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.settings import OptionError
from wallaroo.workflows.sources.embedded import parse_cell, read_cells


@pytest.fixture
def pictures(outputs, tmp_path):
    """A finished run: 3 shards of 20 rows, two samples an id; row 3 of each shard is an error."""
    tables = [outputs.plan_table(rows=20, first_row=20 * n, shard=n, errors=(3,)) for n in range(3)]
    output = tmp_path / "pictures"
    finish(str(output), outputs.make_output(output, tables))
    return output


@pytest.fixture
def functions(monkeypatch):
    """A module of the user's with the functions put into it."""
    module = types.ModuleType("checks")
    monkeypatch.setitem(sys.modules, "checks", module)
    return module


def kept(dest, folder="data"):
    return [row for path in sorted((dest / folder).glob("*")) for row in pq.read_table(path).to_pylist()]


def dropped(dest):
    return [json.loads(line) for line in (dest / "_dropped.jsonl").read_text().splitlines()]


def test_without_rules_all_ok_rows_are_copied_as_they_are(pictures, tmp_path):
    dest = tmp_path / "dest"
    found = select(str(pictures), str(dest), Rules())
    assert (found.rows, found.kept, found.dropped, found.failures) == (60, 57, {"error row": 3}, 0)
    for shard in range(3):
        name = layout.shard_name(shard)
        before, after = (pq.read_table(folder / "data" / name) for folder in (pictures, dest))
        ok = before.filter(np.array(before.column("status")) == "ok")
        assert after.equals(ok) and after.schema.equals(before.schema, check_metadata=True)
    assert [line["id"] for line in dropped(dest)] == ["p1", "p11", "p21"]
    assert dropped(dest)[1] == {"id": "p11", "row": 23, "sample": 1, "why": "error row"}
    assert verify(str(pictures), lambda words: None).state == "complete"


def test_a_filter_sees_whole_rows_and_may_fail(pictures, tmp_path, functions):
    def bright(row):
        if row["row_id"] == 10:
            raise ValueError("no idea")
        if row["row_id"] == 11:
            return "yes"
        return bool(np.frombuffer(row["image"]["bytes"][:4], np.uint8)[1] == ord("P")) and row["row_id"] < 40

    functions.bright = bright
    found = select(str(pictures), str(tmp_path / "dest"), Rules(filter="checks:bright"))
    assert (found.kept, found.failures) == (36, 2)
    assert found.dropped == {"filter": 19, "error row": 3, "filter failed": 2}
    failed = [line for line in dropped(tmp_path / "dest") if line["why"] == "filter failed"]
    assert [line["message"] for line in failed] == [
        "ValueError: no idea",
        "TypeError: it returned 'yes', but must return True or False",
    ]
    assert len(kept(tmp_path / "dest")) == 36


def test_the_best_of_each_id_by_a_function(pictures, tmp_path, functions):
    functions.score = lambda row: None if row["row_id"] == 59 else [0, 5, 5][row["row_id"] % 3]
    found = select(str(pictures), str(tmp_path / "dest"), Rules(best_of="checks:score"))
    best = {row["id"]: row["row_id"] for row in kept(tmp_path / "dest")}
    assert found.kept == len(best) == 30 and found.failures == 1
    # Of rows 0 and 1 the second is better; of 2 and 3 the second is an error; of 4 and 5 the first wins.
    assert (best["p0"], best["p1"], best["p2"], best["p3"], best["p29"]) == (1, 2, 4, 7, 58)
    assert found.dropped == {"not the best": 26, "error row": 3, "score failed": 1}


def test_the_best_of_each_id_by_a_column(pictures, tmp_path):
    found = select(str(pictures), str(tmp_path / "dest"), Rules(best_of="weight"))
    best = [row["row_id"] for row in kept(tmp_path / "dest")]
    assert found.kept == 30 and best == [row - (row % 20 == 3) for row in range(1, 60, 2)]


def judge(outputs, pictures, output, change=lambda row: row):
    """A data set of answers about `pictures`, whose row_ids go from 0: each gets a score of its own."""
    rows = pq.read_table(pictures / "data" / layout.shard_name(0)).to_pylist()
    ok = [row for row in rows if row["status"] == "ok"]

    plan = outputs.make_task_output(output, "understand", rows=len(ok))
    path = output / "data" / layout.shard_name(0)
    table = pq.read_table(path)
    judged = table.to_pylist()
    for row, origin in zip(judged, ok, strict=True):
        row["source"] |= change({"row_id": origin["row_id"], "sha256": origin["sha256"]})
    shards.write_shard(str(output), 0, type(table).from_pylist(judged, table.schema))
    finish(str(output), plan)
    return {origin["row_id"]: row["text"] for row, origin in zip(judged, ok, strict=True)}


@pytest.fixture
def one_shard(outputs, tmp_path):
    output = tmp_path / "one"
    finish(str(output), outputs.make_output(output, [outputs.plan_table(rows=20, errors=(3,))]))
    return output


def test_the_best_by_answers_about_the_pictures(one_shard, outputs, tmp_path):
    answers = judge(outputs, one_shard, tmp_path / "judged")
    select(str(one_shard), str(tmp_path / "dest"), Rules(best_of="text", scores=str(tmp_path / "judged")))
    found = [row["row_id"] for row in kept(tmp_path / "dest")]
    score = {row: int(text.split("/")[0].split()[1]) for row, text in answers.items()}
    wanted = []
    for first in range(0, 20, 2):
        both = [row for row in (first, first + 1) if row in score]
        wanted.append(max(both, key=lambda row: (score[row], -row)))
    assert found == wanted and len(set(score.values())) == 10


def test_scores_of_other_pictures_are_refused(one_shard, outputs, tmp_path):
    judge(outputs, one_shard, tmp_path / "judged", lambda row: row | {"sha256": "f" * 64})
    with pytest.raises(InputError, match="from another image than that of row_id 0"):
        select(str(one_shard), str(tmp_path / "dest"), Rules(best_of="text", scores=str(tmp_path / "judged")))


def test_rows_that_nobody_judged_are_told(one_shard, outputs, tmp_path):
    judge(
        outputs,
        one_shard,
        tmp_path / "judged",
        lambda row: row | {"row_id": row["row_id"] + 1000 * (row["row_id"] < 2)},
    )
    rules = Rules(best_of="text", scores=str(tmp_path / "judged"))
    found = select(str(one_shard), str(tmp_path / "dest"), rules)
    assert found.failures == 2 and found.kept == 9
    assert [line["row"] for line in dropped(tmp_path / "dest") if line["why"] == "score failed"] == [0, 1]
    words = f"it has no score: {tmp_path}/judged has no number for it"
    assert found.examples == {"score failed": words}


def scene(seed, size=(200, 150)):
    """A smooth picture, which survives a change of size or format, as noise does not."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def bits(one, other):
    return (one ^ other).bit_count()


def test_the_hash_survives_size_and_format_and_tells_pictures_apart(tmp_path):
    scenes = [scene(seed) for seed in range(20)]
    for image in scenes:
        image.save(tmp_path / "a.jpg", quality=60)
        assert bits(dhash(image), dhash(Image.open(tmp_path / "a.jpg"))) <= 4
        assert bits(dhash(image), dhash(image.resize((90, 80)))) <= 4
        assert bits(dhash(image), dhash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 16
    hashes = [dhash(image) for image in scenes]
    assert min(bits(a, b) for n, a in enumerate(hashes) for b in hashes[:n]) > 8


def test_the_hash_is_what_it_says():
    ramp = np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))
    assert dhash(Image.fromarray(ramp)) == 2**64 - 1 and dhash(Image.fromarray(ramp[:, ::-1])) == 0
    ramp[0] = 0
    ramp[0, 1] = 90
    assert dhash(Image.fromarray(ramp)) == 2**64 - 1 - (0x7F << 56)


def test_many_rows_that_stay_are_found_as_by_looking_at_all():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**63, 3000).astype(np.uint64)
    for row in range(1500, 3000):
        hashes[row] = hashes[row % 1500] ^ np.uint64(1 << (row % 63)) ^ np.uint64(1 << (row // 64))
    for distance in (1, 2, 12):
        known = decide._Near(hashes, distance)
        stay = np.zeros(0, np.int64)
        for row in range(3000):
            near = stay[np.bitwise_count(hashes[stay] ^ hashes[row]) <= distance]
            assert known.first(row) == (near[0] if len(near) else -1)
            if not len(near):
                known.add(row)
                stay = np.append(stay, row)
        assert len(stay) > 1024


def test_each_phase_counts_its_rows(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "TOLD_SECONDS", 0.0)
    told = []
    select(str(pictures), str(tmp_path / "dest"), Rules(near_duplicates=4), on_progress=told.append)
    last = {one.phase: (one.done, one.rows) for one in told}
    assert last == {"reading": (60, 60), "comparing": (57, 57), "writing": (60, 60)}
    assert [one.phase for one in told] == sorted((one.phase for one in told), key=list(last).index)
    told.clear()
    export(str(pictures), str(tmp_path / "files"), "files", on_progress=told.append)
    assert (told[-1].phase, told[-1].done, told[-1].rows) == ("exporting", 60, 60)


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 8, 9, 16])
def test_near_hashes_are_found_as_by_looking_at_all(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**63, 400).astype(np.uint64)
    for row in range(100, 400):
        # Some are others with a few bits changed.
        flips = rng.integers(0, 64, rng.integers(0, 20)).astype(np.uint64)
        hashes[row] = hashes[rng.integers(0, 100)]
        for flip in flips:
            hashes[row] ^= np.uint64(1) << flip
    known, stay, found, wanted = decide._Near(hashes, distance), [], [], []
    for row in range(400):
        wanted.append(next((n for n in stay if bits(int(hashes[n]), int(hashes[row])) <= distance), -1))
        found.append(known.first(row))
        if wanted[-1] < 0:
            stay.append(row)
            known.add(row)
    assert found == wanted and 100 <= len(stay) < 400


def test_near_duplicates_go_and_the_first_stays(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(12):
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        scene(number // 3).resize((100 + number, 80)).save(folder / name)
        lines.append({"id": f"i{number}", "image": f"pictures/{name}", "prompt": "x"})
    (folder / "bad.png").write_bytes(b"<html>")
    lines += [{"id": "bad", "image": "pictures/bad.png"}, {"id": "gone", "image": "pictures/gone.png"}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    found = select(str(manifest), str(tmp_path / "dest"), Rules(near_duplicates=4))
    assert [row["id"] for row in kept(tmp_path / "dest")] == ["i0", "i3", "i6", "i9"]
    assert found.dropped == {"near-duplicate": 8, "image failed": 2} and found.failures == 2
    told = dropped(tmp_path / "dest")
    assert [line["near_row"] for line in told if line["why"] == "near-duplicate"] == [0, 0, 3, 3, 6, 6, 9, 9]
    assert "HTML" in told[-2]["message"] and "does not exist" in told[-1]["message"]


@pytest.mark.parametrize("given", ["set [1]*?", "set [1]*?/deep", "set [1]*?/deep/m.jsonl", "set [1]*?/*/m*"])
def test_pictures_are_looked_for_beside_the_file_that_names_them(tmp_path, given):
    folder = tmp_path / "set [1]*?" / "deep"
    folder.mkdir(parents=True)
    lines = []
    for number in range(2):
        scene(1).save(folder / f"{number}.png")
        lines.append(json.dumps({"id": f"i{number}", "image": f"{number}.png", "prompt": "x"}))
    (folder / "m.jsonl").write_text("\n".join(lines))
    found = select(str(tmp_path / given), str(tmp_path / "dest [*]"), Rules(near_duplicates=4))
    assert found.dropped == {"near-duplicate": 1} and not found.failures
    assert [row["id"] for row in kept(tmp_path / "dest [*]")] == ["i0"]


def test_pictures_of_an_output_and_sources_of_answers_are_hashed(pictures, outputs, tmp_path):
    assert select(str(pictures), str(tmp_path / "a"), Rules(near_duplicates=4)).kept > 40
    answers = tmp_path / "answers"
    finish(str(answers), outputs.make_task_output(answers, "understand", rows=8, samples=2))
    found = select(str(answers), str(tmp_path / "b"), Rules(near_duplicates=0))
    assert [row["row_id"] for row in kept(tmp_path / "b")] == [0, 2, 4, 6]
    assert found.dropped == {"near-duplicate": 4}


def test_answers_about_pictures_of_an_output_are_hashed_by_these(pictures, outputs, tmp_path):
    shard = str(pictures / "data" / layout.shard_name(1))
    answers = tmp_path / "answers"
    within = lambda n: {"source": {"uri": shard, "row_id": 20 + n // 2}}  # noqa: E731
    finish(str(answers), outputs.make_task_output(answers, "understand", rows=10, more=within))
    found = select(str(answers), str(tmp_path / "b"), Rules(near_duplicates=0))
    assert [row["row_id"] for row in kept(tmp_path / "b")] == [0, 2, 4, 8]
    # Row 23 is an error row, which has no picture.
    assert found.dropped == {"near-duplicate": 4, "image failed": 2}


def test_a_split_keeps_ids_together_and_never_moves_them(pictures, outputs, tmp_path):
    rules = Rules(split={"train": 0.7, "test": 0.3})
    found = select(str(pictures), str(tmp_path / "a"), rules)
    train, test = ({row["id"] for row in kept(tmp_path / "a", name)} for name in ("train", "test"))
    assert not train & test and len(train | test) == 30 and len(train) > len(test) > 2
    assert sum(found.splits.values()) == found.kept == 57
    assert len(kept(tmp_path / "a", "train")) == found.splits["train"]
    # The names may come in any order, rows may come and go.
    again = Rules(filter=None, best_of="weight", split={"test": 0.3, "train": 0.7})
    select(str(pictures), str(tmp_path / "b"), again)
    assert {row["id"] for row in kept(tmp_path / "b", "train")} == train
    manifest = tmp_path / "ids.csv"
    manifest.write_text("id,prompt\n" + "".join(f"p{n},x\n" for n in reversed(range(2000))))
    big = select(str(manifest), str(tmp_path / "c"), rules)
    ids = {name: {row["id"] for row in kept(tmp_path / "c", name)} for name in ("train", "test")}
    assert train <= ids["train"] and test <= ids["test"]
    assert big.kept == 2000 and 1300 < big.splits["train"] < 1500


def test_a_group_is_another_column_than_id(tmp_path):
    manifest = tmp_path / "m.jsonl"
    rows = [{"id": str(n), "album": n // 4, "score": f"{n % 3} of 3"} for n in range(40)]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    rules = Rules(best_of="score", split={"a": 0.5, "b": 0.5}, group="album")
    select(str(manifest), str(tmp_path / "dest"), rules)
    found = kept(tmp_path / "dest", "a") + kept(tmp_path / "dest", "b")
    assert sorted(row["album"] for row in found) == list(range(10))
    assert {row["score"] for row in found} <= {"2 of 3", "1 of 3"}


def test_a_manifest_of_all_formats_keeps_its_columns_and_is_one_again(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt,n\ncat,1\ndog\n")
    (folder / "b.jsonl").write_text('{"prompt": "袋鼠", "x": [1, "a"]}\nnot json\n')
    found = select(str(folder), str(tmp_path / "dest"), Rules())
    assert [(row["prompt"], row["n"], row["x"]) for row in kept(tmp_path / "dest")] == [
        ("cat", "1", None),
        ("袋鼠", None, '[1, "a"]'),
    ]
    assert found.dropped == {"unreadable row": 2} and found.failures == 2
    assert [line["id"] for line in dropped(tmp_path / "dest")] == ["a.csv:1", "b.jsonl:1"]
    again = discover(str(tmp_path / "dest"))
    assert [file.relative for file in again.files] == ["data/part-00000.parquet", "data/part-00001.parquet"]


def test_a_selection_is_a_manifest_of_the_next_task_as_its_output_is(pictures, tmp_path):
    select(str(pictures), str(tmp_path / "dest"), Rules(near_duplicates=0, split={"train": 0.5, "test": 0.5}))
    for folder in ("train", "test"):
        rows = kept(tmp_path / "dest", folder)
        path = str(tmp_path / "dest" / folder)
        columns, pieces = Columns(), []
        for number, file in enumerate(discover(path, "edit").files):
            found = scan(file)
            columns.add(number, file.path, found)
            pieces += found.pieces
        schema = columns.schema()
        again = [row for piece in pieces for batch in read(piece, schema) for row in batch.table.to_pylist()]
        assert [row["in_row_id"] for row in again] == [row["row_id"] for row in rows]
        for row, origin in zip(again, rows, strict=True):
            cell = parse_cell(row["image"])
            [(_, image)] = read_cells(cell.path, [cell.row])
            assert hashlib.sha256(image["bytes"]).hexdigest() == origin["sha256"] == row["in_sha256"]
        assert len({row["id"] for row in again}) == len(again) and not {"seed", "prompt"} & set(schema.names)


def test_the_same_selection_again_gives_the_same_files(pictures, tmp_path, functions):
    functions.few = lambda row: row["row_id"] < 30
    dest = tmp_path / "dest"
    rules = Rules(filter="checks:few", near_duplicates=2, split={"train": 0.9, "test": 0.1})
    select(str(pictures), str(dest), rules)
    first = {path.relative_to(dest): path.read_bytes() for path in dest.rglob("*") if path.is_file()}
    select(str(pictures), str(dest), rules)
    assert {p.relative_to(dest): p.read_bytes() for p in dest.rglob("*") if p.is_file()} == first
    # The function has changed: what is not kept any more goes.
    functions.few = lambda row: row["row_id"] < 10
    found = select(str(pictures), str(dest), rules)
    assert (
        found.kept == 9 == len(kept(dest, "train") + (kept(dest, "test") if (dest / "test").exists() else []))
    )
    with pytest.raises(InputError, match="holds another selection"):
        select(str(pictures), str(dest), Rules())


def test_the_card_of_a_selection_lets_datasets_read_its_splits(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    found = select(str(pictures), str(tmp_path / "dest"), Rules(split={"train": 0.7, "test": 0.3}))
    read = datasets.load_dataset(str(tmp_path / "dest"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in read.items()} == found.splits
    assert read["test"][0]["image"].size in ((64, 64), (80, 64))


def test_places_that_cannot_be_are_refused(pictures, tmp_path):
    with pytest.raises(InputError, match="is inside"):
        select(str(pictures), str(pictures / "best"), Rules())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"is not empty and not a selection; it holds mine\.txt"):
        select(str(pictures), str(tmp_path / "full"), Rules())
    (pictures / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="is not finished"):
        select(str(pictures), str(tmp_path / "dest"), Rules())
    with pytest.raises(InputError, match="cannot be read"):
        select(str(tmp_path / "nothing"), str(tmp_path / "dest"), Rules())
    assert not (tmp_path / "dest").exists()


def test_a_broken_shard_is_one_sentence(pictures, tmp_path):
    (pictures / "data" / "shard-00000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"shard-00000001\.parquet of .* cannot be read"):
        select(str(pictures), str(tmp_path / "dest"), Rules())


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"split": {"a": 0.5, "b": 0.4}}, "sum to 0.9"),
        ({"split": {"a": 0}}, "must be above 0"),
        ({"split": {"a/b": 1}}, "letters, digits"),
        ({"near_duplicates": 17}, "from 0 to 16"),
        ({"scores": "x"}, "--scores needs a column of them"),
        ({"filter": "nothing"}, "is not the name of a function"),
        ({"filter": "no_such_module:f"}, "ModuleNotFoundError"),
        ({"filter": "json:dump5"}, "AttributeError"),
        ({"filter": "json:__doc__"}, "is not a function"),
        ({"best_of": "wieght"}, "did you mean 'weight'"),
        ({"group": "albun"}, "has no column 'albun'"),
    ],
)
def test_rules_that_cannot_be_are_told(pictures, tmp_path, rules, words):
    with pytest.raises(OptionError, match=words):
        select(str(pictures), str(tmp_path / "dest"), Rules(**rules))


def test_a_function_that_always_fails_ends_it(pictures, tmp_path, functions, monkeypatch):
    monkeypatch.setattr(look, "MAX_FAILURES", 10)

    def broken(row):
        raise KeyError("nope")

    functions.broken = broken
    with pytest.raises(InputError, match=r"More than 10 rows .* failed .*KeyError: 'nope'"):
        select(str(pictures), str(tmp_path / "dest"), Rules(filter="checks:broken"))
    # What did not end stands in nobody's way.
    assert select(str(pictures), str(tmp_path / "dest"), Rules()).kept == 57


def test_functions_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class A:\n    @staticmethod\n    def f(row):\n        return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_function("mine:A.f")({}) is True


@pytest.mark.parametrize(
    ("value", "score"),
    [(3, 3), (2.5, 2.5), ("8/10", 8), ("I'd say -1.5.", -1.5), (True, 1), (np.float32(2), 2)],
)
def test_scores_are_numbers_or_texts_with_one(value, score):
    assert datasets_rules.number(value) == score


@pytest.mark.parametrize("value", [None, "none", "", float("nan"), float("inf")])
def test_what_is_no_score(value):
    with pytest.raises(ValueError, match="score"):
        datasets_rules.number(value)


def test_every_row_is_kept_or_told(pictures, tmp_path, functions):
    functions.odd = lambda row: row["row_id"] % 5 != 0
    functions.score = lambda row: 1 / (row["row_id"] - 31)
    rules = Rules(filter="checks:odd", best_of="checks:score", near_duplicates=9, split={"a": 0.5, "b": 0.5})
    found = select(str(pictures), str(tmp_path / "dest"), rules)
    rows = [r["row_id"] for name in found.splits for r in kept(tmp_path / "dest", name)]
    told = [line["row"] for line in dropped(tmp_path / "dest")]
    assert sorted(rows + told) == list(range(60)) and len(rows) == found.kept
    assert Counter(line["why"] for line in dropped(tmp_path / "dest")) == Counter(found.dropped)
    assert json.loads((tmp_path / "dest" / "_selection.json").read_text())["result"]["kept"] == found.kept
    shutil.rmtree(tmp_path / "dest")
