"""The viewer without a browser: pages by keyset, filters, facets, the index, votes, and who may ask."""

import collections
import datetime
import html
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from tests.s3_proxy import proxy
from tests.viewers import serving, wait_for
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs import layout
from wallaroo.workflows.outputs import shards as outputs_shards
from wallaroo.workflows.viewer import again, index, server, shards, votes
from wallaroo.workflows.viewer.index import QueryError
from wallaroo.workflows.viewer.output import Output
from wallaroo.workflows.viewer.query import Place, Query
from wallaroo.workflows.viewer.votes import Key, Votes, wilson


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of indexes for each test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def opened():
    """A function that opens an output with its index filled."""
    indexes = []

    def open_output(path, fill=True):
        made = index.Index([str(path)])
        indexes.append(made)
        output = Output(0, str(path), made)
        if fill:
            fill_index(output)
        return output

    yield open_output
    for one in indexes:
        one.close()


def fill_index(output):
    import threading

    for _ in output.fill(threading.Event()):
        pass


@pytest.fixture
def three(tmp_path, outputs):
    """120 rows in three shards, among them planned errors and one of the engine."""
    tables = [outputs.plan_table(40, 40 * i, i, errors=(3, 7)) for i in range(3)]
    outputs.make_output(tmp_path / "out", tables, failed={1: (5,)})
    return tmp_path / "out"


def all_rows(path):
    rows = []
    for number in sorted(layout.list_done(str(path))):
        table = pq.read_table(layout.shard_path(str(path), number)).drop_columns(["image"])
        rows += [{**row, "position": place} for place, row in enumerate(table.to_pylist())]
    return rows


def mark(row):
    return row["shard"], row["position"]


def walk(output, query, count, backwards=False):
    """All rows of a query, page by page."""
    found, place = [], Place(1 << 40, 0, True) if backwards else None
    if backwards:
        last = output.rows.page(query, None, 1000)[-1]
        place, found = Place(*mark(last), True), [last]
    while True:
        page = output.page(query, place, count)
        found = page.rows + found if backwards else found + page.rows
        if (page.first if backwards else page.last) or not page.rows:
            return found
        place = Place(*mark(page.rows[0]), True) if backwards else Place(*mark(page.rows[-1]))


# Pages


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


# What is asked


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
    assert output.row(0, 1)["list"] == [] and output.row(0, 1)["bytes"] == b"2"


# The index


def test_index_is_kept_and_follows_the_shards(three, opened, outputs):
    first = opened(three)
    assert first.progress().complete
    first.index.close()
    second = opened(three, fill=False)
    assert second.progress().complete and second.rows.count(Query()) == 120
    second.index.close()
    # One shard is made anew with another row wrong, one is gone.
    table = outputs.result_table(outputs.plan_table(40, 40, 1), failed=(9,))
    outputs_shards.write_shard(str(three), 1, table)
    os.unlink(layout.shard_path(str(three), 2))
    third = opened(three, fill=False)
    assert [shard.number for shard in third.missing()] == [1]
    fill_index(third)
    assert third.rows.count(Query()) == 80
    failed = third.rows.page(Query(where="error_type = 'engine'"), None, 10)
    assert [mark(row) for row in failed] == [(1, 9)]


def test_output_that_was_made_anew_is_indexed_anew(tmp_path, outputs, opened):
    path = tmp_path / "out"
    outputs.make_output(path, [outputs.plan_table(10)])
    opened(path).index.close()
    shutil.rmtree(path)
    plan = outputs.plan_table(20).append_column("more", pa.array(["m"] * 20))
    outputs.make_output(path, [plan])
    output = opened(path)
    assert not output.unreadable and output.rows.count(Query(where="more = 'm'")) == 20


SECOND = """
import sys, threading
from workflows.viewer import index, output
from workflows.viewer.query import Query

made = index.Index([sys.argv[1]])
one = output.Output(0, sys.argv[1], made)
print(one.progress().indexed)
for _ in one.fill(threading.Event()):
    pass
print(one.rows.count(Query()))
"""


def test_two_viewers_and_a_damaged_index(three, opened):
    first = opened(three)
    command = [sys.executable, "-c", SECOND, str(three)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "120"]
    first.index.close()
    (path,) = index.cache_folder().glob("*.duckdb")
    path.write_bytes(b"nothing of the kind" * 1000)
    assert opened(three).rows.count(Query()) == 120


def test_shard_that_cannot_be_read_harms_no_other(three, opened):
    Path(layout.shard_path(str(three), 0)).write_bytes(b"PAR1 nothing PAR1")
    before = opened(three, fill=False)
    assert [mark(row) for row in walk(before, Query(), 9)] == [
        mark(row) for row in all_rows_of(three, (1, 2))
    ]
    before.index.close()
    after = opened(three)
    assert after.unreadable and after.rows.count(Query()) == 80
    with pytest.raises(InputError, match=r"shard-00000000\.parquet cannot be shown"):
        after.row(0, 0)


def all_rows_of(path, shards):
    found = []
    for number in shards:
        rows = pq.read_metadata(layout.shard_path(str(path), number)).num_rows
        found += [{"shard": number, "position": place} for place in range(rows)]
    return found


# Made again, and where from


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
        "allow_https": True, "cfg_interval": "0:0.5", "weights": "int8",
        "template_zh": "{prompt}", "threads": 3}, (), None, {})  # fmt: skip
    output.run["options"].clear()
    output.run["options"].update(config.to_dict())
    words = shlex.split(again.recipe(output, output.row(0, 0)).command.rpartition("\n")[2])
    given = dict(itertools.pairwise(words))
    named = {word for word in words if word.startswith("--")}
    assert named <= flags and len(named) == 12
    assert given["--max-prompt-tokens"] == "9" and given["--cfg-interval"] == "0:0.5"


def test_error_row_shows_its_row_of_the_manifest(three, opened):
    output = opened(three, fill=False)
    line = json.loads(again.recipe(output, output.row(1, 5)).manifest)
    assert line["id"] == "p22" and line["tag"] == "t5" and line["include"] == [{"class": "cat"}]
    assert "kind" not in line and "message" not in line


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
    assert (step.kind, step.where) == ("picture", str(tmp_path / "sources" / "s0.png"))


# Votes


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (9, 10, 0.5958, 0.9821)],
)
def test_wilson_interval(hits, count, low, high):
    found = wilson(hits, count)
    assert found == pytest.approx((low, high), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_votes_are_kept_replaced_and_summed(tmp_path):
    path = str(tmp_path / "a.votes.parquet")
    mine, theirs = Votes(path, ["/o/a", "/o/b"]), Votes(path, ["/o/b", "/o/a"])
    mine.cast(Key("x", 0, 0), ["1", "2"], "/o/a")
    # Both began with the same file; neither loses the other's vote.
    theirs.cast(Key("y", 0, 1), ["3", "4"], "/o/b")
    mine.cast(Key("z", 0, 0), ["5", "6"], votes.TIE)
    mine.cast(Key("x", 0, 0), ["1", "2"], "/o/b")
    Votes(path, ["/o/a", "/o/c"]).cast(Key("x", 0, 0), ["1", "7"], votes.BAD)
    found = Votes(path, ["/o/a", "/o/b"])
    assert found.choices() == {Key("x", 0, 0): "/o/b", Key("y", 0, 1): "/o/b", Key("z", 0, 0): "tie"}
    summary = found.summary()
    assert (summary.votes, summary.ties, summary.bad) == (3, 1, 0)
    assert [(share.votes, share.decided) for share in summary.shares] == [(0, 2), (2, 2)]
    found.cast(Key("z", 0, 0), [], None)
    table = pq.read_table(path)
    assert table.num_rows == 3 and table.column("choice").to_pylist().count("/o/b") == 2
    rows = {(row["id"], tuple(row["outputs"])): row["sha256"] for row in table.to_pylist()}
    assert rows["x", ("/o/a", "/o/b")] == ["1", "2"]
    with pytest.raises(ValueError, match="choice 'c'"):
        found.cast(Key("x", 0, 0), [], "c")


def test_another_file_is_never_taken_for_votes(tmp_path):
    for name, data in (("a.parquet", b"notes"), ("b.parquet", None)):
        path = tmp_path / name
        if data is None:
            pq.write_table(pa.table({"id": ["x"]}), path)
        else:
            path.write_bytes(data)
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"is no file of votes: give another --votes PATH\."):
            Votes(str(path), ["a", "b"])
        assert path.read_bytes() == before


def test_votes_lie_beside_the_output():
    assert votes.default_path("/x/out/") == "/x/out.votes.parquet"
    assert votes.default_path("s3://bucket/a/b") == "s3://bucket/a/b.votes.parquet"
    with pytest.raises(InputError, match="whole bucket"):
        votes.default_path("s3://bucket/")


# Who may ask


def test_pages_escape_and_say_what_a_browser_may_do(tmp_path, outputs):
    bad = "<script>alert(1)</script>\" onload='x'"
    outputs.make_output(
        tmp_path / "out",
        [outputs.plan_table(4)],
        edit=lambda row: row | {"prompt": bad, "id": f"{bad}{row['id']}"},
    )
    with serving(tmp_path / "out") as served:
        served.indexed()
        for path in ("/0/", "/0/rows/0/0", "/0/?q=%3Cscript%3E&f.status=%3Cb%3E", "/0/?where=%3Cscript%3E"):
            answer = served.get(path)
            assert "<script>alert" not in answer.text and "<b>ok" not in answer.text
            assert set(re.findall(r"<script[^>]*>", answer.text)) == {
                re.search(r"<script defer[^>]*>", answer.text)[0]
            }
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert html.escape(bad, quote=False)[:20] in served.get("/0/").text


def test_other_names_other_sites_and_other_paths_are_refused(three, tmp_path):
    shutil.copytree(three, tmp_path / "other")
    with serving(three, tmp_path / "other", votes=tmp_path / "v.parquet") as served:
        host = served.base.removeprefix("http://")
        for name in (host, "localhost:1", "LOCALHOST", "[::1]:80"):
            assert served.get("/0/", {"Host": name}).status == 200
        for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", ""):
            assert served.get("/0/", {"Host": name}).status == 421
        assert served.get("/0/", {"Sec-Fetch-Site": "cross-site"}).status == 403
        assert served.get("/0/live", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}).status == 403
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert served.get("/0/", link).status == 200
        for path in (
            "/static/../app.py", "/static/%2e%2e/app.py", "/static/app.py", "/2/", "/0/pictures/0/400",
            "/0/pictures/7/0", "/0/rows/..%2f..%2f/0", "/0/pictures/0/3",
            "/0/sources/0/0", "/etc/passwd", "/-1/",
        ):  # fmt: skip
            assert served.get(path).status == 404, path
        vote = {"id": "p0", "version": "0", "sample": "0", "choice": "a"}
        for headers in (
            {},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://{host}0"},
        ):
            assert served.get("/votes", headers, vote).status == 403
        strange = {"Origin": served.base, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert served.get("/votes", strange, vote).status == 403
        assert not (tmp_path / "v.parquet").exists()
        assert served.get("/votes", {"Origin": served.base}, vote | {"choice": "/etc"}).status == 400
        for wrong in ({}, {"version": "x"}, {"version": str(2**31)}, {"sample": "-1"}):
            values = {"choice": "a"} | (vote | wrong if wrong else {})
            assert served.get("/votes", {"Origin": served.base}, values).status == 400
        answer = served.get("/votes", {"Origin": served.base}, vote | {"back": "//evil.example/compare"})
        assert (answer.status, answer.headers["Location"]) == (303, "/compare")
        assert pq.read_table(tmp_path / "v.parquet").column("choice").to_pylist() == [str(three)]


def test_other_machines_need_the_token(three):
    with serving(three, hosts=None, token="secret") as served:
        assert served.get("/0/").status == 403
        assert served.get("/0/?token=other").status == 403
        assert served.get("/0/", {"Cookie": "wallaroo-view=other"}).status == 403
        answer = served.get("/0/?token=secret&tile=s")
        assert (answer.status, answer.headers["Location"]) == (303, "/0/?tile=s")
        cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert served.get("/0/", {"Cookie": cookie.partition(";")[0], "Host": "box:80"}).status == 200
        assert served.get("//evil.example/?token=secret").headers["Location"] == "/evil.example/"


def test_source_is_shown_only_if_it_is_what_the_model_saw(tmp_path, outputs):
    outputs.make_task_output(tmp_path / "out", "edit", bad=(1,))
    with serving(tmp_path / "out") as served:
        answer = served.get("/0/sources/0/0")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "image/webp")
        assert served.get("/0/sources/0/1").status == 404
        (tmp_path / "sources" / "s0.png").write_bytes((tmp_path / "sources" / "s1.png").read_bytes())
        assert served.get("/0/sources/0/0").status == 404
        assert "s0.png" in served.get("/0/rows/0/0").text


def test_running_run_is_described(tmp_path, outputs):
    from wallaroo.workflows.outputs.run_log import RunLog

    tables = [outputs.plan_table(4, 4 * i, i) for i in range(3)]
    outputs.make_output(tmp_path / "out", tables, skip=(1, 2))
    seconds = itertools.count(time.time())
    with RunLog(str(tmp_path / "out"), {}, lambda: next(seconds)) as log:
        log.update(rows=12, done=0, before=0, errors={}, images=0)
        log.update(rows=12, done=4, before=0, errors={"size": 1}, images=3)
        log.end("running")
        with serving(tmp_path / "out") as served:
            state = json.loads(served.get("/0/live").text)
            assert state["running"] and state["shards"] == 1
            text = re.sub(r"<[^>]+>|\s+", " ", state["html"])
            assert re.search(r"running .*4 +of 12 +rows .*1 +error .*rows/s .*left", re.sub(" +", " ", text))
            outputs_shards.write_shard(str(tmp_path / "out"), 1, outputs.result_table(tables[1]))
            wait_for(lambda: json.loads(served.get("/0/live").text)["shards"] == 2)
            served.indexed()
            assert ">8<" in served.get("/0/?q=cat").text


# The command


def test_command_says_what_is_wrong(tmp_path, three):
    import socket

    from wallaroo.jobs.cli import main

    def told(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["view", "--no-open", *map(str, arguments)])
        return ended.value.code

    assert told(tmp_path) == 1
    assert told() == 2
    assert told(three, "--port", "70000") == 2
    assert told(*[three] * 9) == 1
    with pytest.raises(InputError, match=r"/out is given twice: give each output once\."):
        server.serve([str(three), f"{three}/"], 0)
    words = r"127\.0\.0\.1:\d+ is taken: give another --host or --port\."
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=words):
        server.serve([str(three)], taken.getsockname()[1])
    with pytest.raises(InputError, match=r"has no run\.json: give the folder of one"):
        server.serve([str(tmp_path)], 0)


def test_command_serves_until_it_is_interrupted(three, tmp_path):
    """As a process of its own, whose memory an expression of a user cannot fill."""
    import signal
    import urllib.parse
    import urllib.request

    command = [sys.executable, "-m", "wallaroo.jobs.cli", "view", str(three), "--no-open", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
            page = urllib.request.urlopen(address, timeout=60).read().decode()
            assert "a cat, number 0" in page

            def answer(where):
                query = urllib.parse.urlencode({"where": where})
                try:
                    return urllib.request.urlopen(f"{address}0/?{query}", timeout=60).read().decode()
                except urllib.error.HTTPError as error:
                    with error:
                        return error.read().decode()

            wait_for(lambda: ">120<" in answer("true"))
            assert "more memory than a page may use" in answer("length(repeat(prompt, 100000000)) > 0")
            assert ">120<" in answer("true")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
        assert process.stderr.read() == ""


def test_missing_extra_is_named(three):
    script = "import sys; sys.modules['uvicorn'] = None; from jobs.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "view", "--no-open", str(three)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "wallaroo: the viewer needs uvicorn, which is not installed: pip install 'wallaroo-batch[view]'.\n"
    )


def test_help_needs_nothing_but_click():
    from wallaroo.jobs.cli import cli

    done = CliRunner().invoke(cli, ["view", "--help"])
    assert done.exit_code == 0 and "--votes" in done.output


# S3


def test_first_page_on_s3_takes_few_requests(s3_server, tmp_path, outputs, monkeypatch):
    local = tmp_path / "out"
    outputs.make_output(local, [outputs.plan_table(64, 64 * i, i) for i in range(12)])
    for file in storage.list_files(str(local)):
        storage.write_atomic(f"s3://ready/viewed/{file.relative}", Path(file.path).read_bytes())
    with proxy(s3_server.endpoint, share=0) as between:
        for name, value in s3_server.variables(between.endpoint).items():
            monkeypatch.setenv(name, value)
        storage.forget_clients()
        try:
            with serving("s3://ready/viewed") as served:
                page = served.get("/0/").text
                links = [html.unescape(link) for link in re.findall(r'<img src="([^"]+)"', page)]
                assert len(links) == 48
                assert all(served.get(link).status == 200 for link in links)
                assert between.requests <= 20
                served.indexed()
                assert ">768<" in served.get("/0/?q=cat").text
        finally:
            monkeypatch.undo()
            storage.forget_clients()


def test_votes_on_s3(s3_server):
    path = "s3://ready/a.votes.parquet"
    mine, theirs = (
        Votes(path, ["s3://ready/a", "s3://ready/b"]),
        Votes(path, ["s3://ready/a", "s3://ready/b"]),
    )
    mine.cast(Key("x", 0, 0), ["1", "2"], "s3://ready/a")
    theirs.cast(Key("y", 0, 0), ["1", "2"], "s3://ready/b")
    mine.cast(Key("z", 0, 0), ["1", "2"], votes.TIE)
    assert len(Votes(path, ["s3://ready/a", "s3://ready/b"]).choices()) == 3
