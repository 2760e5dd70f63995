"""Pages by keyset, search, filter and facets, over real outputs."""

import collections
import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.viewers import all_rows, mark, walk
from wallaroo.workflows.outputs import layout
from wallaroo.workflows.viewer import index, shards
from wallaroo.workflows.viewer.index import QueryError
from wallaroo.workflows.viewer.query import Place, Query


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", ["", "prompt", "width", "started_at", "weight", "seconds", "error_type"])
def test_pages_give_every_row_once_in_order(three, opened, sort, descending):
    output = opened(three)
    query = Query(sort=sort, descending=descending)

    def key(row):
        return 0 if not sort or row[sort] is None else row[sort]

    rows = all_rows(three)
    there = [row for row in rows if not sort or row[sort] is not None]
    missing = [row for row in rows if sort and row[sort] is None]
    expected = sorted(there, key=key, reverse=descending and bool(sort)) + missing
    assert (sort in ("started_at", "seconds")) == bool(missing)
    assert [mark(row) for row in walk(output, query, 7)] == [mark(row) for row in expected]
    assert [mark(row) for row in walk(output, query, 7, backwards=True)] == [mark(row) for row in expected]
    middle = Place(*mark(expected[50]))
    assert output.rows.count(query, middle) == 50


def test_random_order_is_of_its_seed(three, opened):
    output = opened(three)
    first, again_, other = (
        [mark(row) for row in walk(output, Query(sort="random", seed=seed), 13)] for seed in (1, 1, 2)
    )
    assert first == again_ != other
    assert sorted(first) == sorted(other) == [mark(row) for row in all_rows(three)]


def test_plan_order_needs_no_index(three, opened):
    output = opened(three, fill=False)
    expected = [mark(row) for row in all_rows(three)]
    assert not output.index.kinds[0]
    found = walk(output, Query(), 7)
    assert [mark(row) for row in found] == expected
    assert found[0]["prompt"] == "a cat, number 0" and "image" not in found[0]
    page = output.page(Query(), Place(2, 5, backwards=True), 50)
    assert [mark(row) for row in page.rows] == expected[35:85] and not page.first
    assert output.page(Query(), Place(0, 3, backwards=True), 50).first


def test_picture_is_the_file_of_its_row(three, opened):
    output = opened(three, fill=False)
    table = pq.read_table(layout.shard_path(str(three), 1))
    for position in (0, 3, 35):
        expected = table.column("image")[position].as_py()
        data = output.reader.picture(output.shard(1), position)
        assert data == (expected["bytes"] if expected else None)
    assert output.reader.picture(output.shard(1), 40) is None


def test_single_picture_of_a_large_row_group_is_found_by_its_digest(tmp_path, outputs, opened, monkeypatch):
    monkeypatch.setattr(shards, "WINDOW_BYTES", 1)
    outputs.make_output(tmp_path / "out", [outputs.plan_table(40)])
    output = opened(tmp_path / "out", fill=False)
    path = layout.shard_path(str(tmp_path / "out"), 0)
    table = pq.read_table(path, columns=["image", "sha256"]).to_pylist()
    data = Path(path).read_bytes()
    for position, row in enumerate(table):
        file = row["image"]["bytes"]
        place = data.index(file)
        assert shards.find_picture(data[place - 4 :], row["sha256"][:16]) == file
        assert shards.find_picture(data[place - 3 :], row["sha256"][:16]) is None
        assert shards.find_picture(data[: place + len(file) - 1], row["sha256"][:16]) is None
        assert output.reader.picture(output.shard(0), position, row["sha256"][:16]) == file
    assert not output.reader._pictures, "a whole row group was read"
    # A digest of another picture leads to the right one all the same.
    assert output.reader.picture(output.shard(0), 0, "0" * 16) == table[0]["image"]["bytes"]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("number 11", {11, *range(110, 120)}),
        ('"number 11"', {11, *range(110, 120)}),
        ("CAT, 9", {n for n in range(120) if "9" in str(n)}),
        ("cat -1 -2", {n for n in range(120) if not set("12") & set(str(n))}),
        ("dog", set()),
        ("'; DROP TABLE rows; --", set()),
    ],
)
def test_search(three, opened, search, expected):
    found = walk(opened(three), Query(search=search), 50)
    assert {int(row["prompt"].split()[-1]) for row in found} == expected


def test_search_looks_into_answers_whatever_their_case_and_accents(tmp_path, outputs, opened):
    outputs.make_task_output(tmp_path / "out", "understand")
    output = opened(tmp_path / "out")
    assert len(walk(output, Query(search="kanguru 袋鼠"), 50)) == 6
    assert [row["row_id"] for row in walk(output, Query(search='"ROW 3"'), 50)] == [3]


def test_filter_is_sql_over_the_columns(three, opened):
    output = opened(three)
    found = walk(output, Query(where="width = 80 AND weight < 3 -- wide and light"), 50)
    expected = [row for row in all_rows(three) if row["width"] == 80 and row["weight"] < 3]
    assert [mark(row) for row in found] == [mark(row) for row in expected] and expected
    assert len(walk(output, Query(where="started_at > TIMESTAMP '2026-01-01'"), 50)) == 114


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("cfg >", "DuckDB refuses"),
        ("cgf > 1", "cgf"),
        ("1 = 1; DELETE FROM o0.rows", "more than one"),
        ("1 = 1) UNION (SELECT 1", "DuckDB refuses"),
        ("id IN (SELECT content FROM read_text('/etc/passwd'))", "disabled"),
        ("id IN (SELECT file FROM glob('/*'))", "disabled"),
        ("id IN (WITH gone AS (DELETE FROM o0.rows RETURNING id) SELECT id FROM gone)", "top level"),
    ],
)
def test_filter_that_is_no_filter_is_refused(three, opened, where, words):
    output = opened(three)
    with pytest.raises(QueryError, match=words):
        output.page(Query(where=where), None, 10)
    assert output.rows.count(Query()) == 120


def test_query_is_stopped_after_its_time(three, opened, monkeypatch):
    output = opened(three)
    monkeypatch.setattr(index, "SECONDS", 0.2)
    where = "(SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range = 7) > shard"
    with pytest.raises(QueryError, match=r"took more than .*: narrow it\."):
        output.page(Query(where=where), None, 10)
    assert output.rows.count(Query()) == 120


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("sort", "promt")], "did you mean 'prompt'"),
        ([("seed", "x")], "seed is 'x'"),
        ([("q", "x" * 4001)], "more than 4,000"),
        ([("f.nothing", "1")], "no column 'nothing'"),
    ],
)
def test_address_that_cannot_be_is_told_in_words(three, opened, pairs, words):
    with pytest.raises(QueryError, match=words):
        opened(three).page(Query.from_parameters(pairs), None, 10)


def test_facets_count_what_else_there_is(three, opened):
    output = opened(three)
    rows = all_rows(three)
    sizes = collections.Counter(f"{row['width']}×{row['height']}" for row in rows if row["status"] == "ok")
    query = Query().toggled("status", "ok").toggled("size", "80×64")
    facets = output.rows.facets(query)
    # Of its own facet every value is counted, of the others what the rest leaves.
    assert dict(facets["size"]) == sizes
    wide = [row for row in rows if (row["width"], row["height"]) == (80, 64)]
    assert dict(facets["status"]) == collections.Counter(row["status"] for row in wide)
    assert "language" not in facets and "tag" not in facets
    found = walk(output, query, 50)
    assert [mark(row) for row in found] == [mark(row) for row in wide if row["status"] == "ok"]
    assert query.toggled("size", "80×64").toggled("status", "ok") == Query()
    assert Query.from_parameters(query.to_parameters()) == query


def test_carried_columns_of_few_values_are_facets(tmp_path, outputs, opened):
    tables = [outputs.plan_table(30)]
    outputs.make_output(tmp_path / "out", tables, edit=lambda row: row | {"tag": f"t{row['row_id'] % 3}"})
    facets = opened(tmp_path / "out").rows.facets(Query())
    assert facets["tag"] == [("t0", 10), ("t1", 10), ("t2", 10)]
    assert "weight" not in facets


def test_numbers_and_digests_of_an_earlier_result_are_no_facets(tmp_path, outputs, opened):
    plan = outputs.plan_table(6)
    carried = {
        "in_status": ["ok", "ok", "ok", "ok", "error", "error"],
        "in_prompt": ["a", "a", "b", "b", "c", "c"],
        "in_in_language": ["en", "en", "zh", "zh", "zh", "zh"],
        "in_seed": [1, 2, 3, 1, 2, 3],
        "in_in_cfg": [1.0, 1.0, 1.0, 2.0, 2.0, 2.0],
        "in_seconds": [0.5, 0.25, 0.5, 0.25, 0.5, 0.25],
        "in_content_digest": ["aa", "bb", "aa", "bb", "aa", "bb"],
        "in_town": ["x", "y", "x", "y", "x", "y"],
    }
    for name, values in carried.items():
        plan = plan.append_column(name, pa.array(values))
    outputs.make_output(tmp_path / "out", [plan])
    facets = opened(tmp_path / "out").rows.facets(Query())
    assert [name for name in facets if name in carried] == [
        "in_status",
        "in_prompt",
        "in_in_language",
        "in_town",
    ]
    assert facets["in_status"] == [("ok", 4), ("error", 2)]


def test_columns_of_any_name_and_type(tmp_path, outputs, opened):
    plan = outputs.plan_table(4)
    names = ["Prompt", "position", 'a"b', "list", "bytes", "when_"]
    arrays = [
        pa.array(["x", "y", "x", "y"]),
        pa.array([1, 2, 3, 4]),
        pa.array([True, False, None, True]),
        pa.array([[1], [], None, [2]]),
        pa.array([b"1", b"2", None, b"4"]),
        pa.array([datetime.date(2026, 1, day) for day in (1, 2, 3, 4)]),
    ]
    for name, array in zip(names, arrays, strict=True):
        plan = plan.append_column(name, array)
    outputs.make_output(tmp_path / "out", [plan])
    output = opened(tmp_path / "out")
    assert not output.unreadable
    columns = set(output.rows.columns)
    assert {"Prompt_1", "position_1", 'a"b', "when_"} <= columns and not {"list", "bytes"} & columns
    found = walk(output, Query(where='"a""b" AND position_1 = 4', sort='a"b', descending=True), 3)
    assert [row["position"] for row in found] == [3]
    assert dict(output.rows.facets(Query())["Prompt_1"]) == {"x": 2, "y": 2}
    found = walk(output, Query(where="Prompt = 'x' -- not prompt"), 3)
    assert [row["position"] for row in found] == [0, 2]
    assert len(walk(output, Query(where="prompt != 'x' AND Prompt_1 = 'y'"), 3)) == 2
    with pytest.raises(QueryError, match="'PROMPT' may be prompt or Prompt, which differ in case"):
        output.page(Query(where="PROMPT = 'x'"), None, 10)
    assert output.row(0, 1)["list"] == [] and output.row(0, 1)["bytes"] == b"2"
