"""The report: complete in its counts, bounded in its size, harmless whatever the rows say."""

import base64
import hashlib
import html.parser
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests.listing import skipped_in_words
from wallaroo.workflows.outputs import rows as outputs_rows
from wallaroo.workflows.outputs import run_file
from wallaroo.workflows.outputs import shards as outputs_shards
from wallaroo.workflows.outputs.run_log import RunLog, RunRecord
from wallaroo.workflows.reports import chart as reports_chart
from wallaroo.workflows.reports import gallery
from wallaroo.workflows.reports import page as reports_page
from wallaroo.workflows.reports import survey as reports_survey
from wallaroo.workflows.reports.chart import draw_chart
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.gallery import thumbnail
from wallaroo.workflows.reports.survey import Place, Survey
from wallaroo.workflows.reports.tally import Stratum

HOSTILE = (
    "<script>alert(1)</script>\" onload='x' </textarea><img src=x onerror=alert(1)>{{ 7*7 }} &amp; \x00\u202e"
)


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its elements with attributes, and its text."""

    def __init__(self, data):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(data.decode())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += " " + " ".join(data.split())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def write(output):
    path = reports_page.write_report(str(output))
    assert path == f"{output}/report.html"
    return Page((output / "report.html").read_bytes())


def tables(outputs, rows, shards, edit=lambda row: row, **changes):
    made = []
    for shard in range(shards):
        table = outputs.plan_table(rows=rows, first_row=rows * shard, shard=shard, **changes)
        made.append(pa.Table.from_pylist([edit(row) for row in table.to_pylist()], schema=table.schema))
    return made


def test_a_report_counts_everything_and_shows_every_picture(outputs, tmp_path):
    plan = outputs.make_output(tmp_path, tables(outputs, 10, 3, errors=(1,)), failed={0: (2, 3)})
    finish(str(tmp_path), plan)
    page = write(tmp_path)
    for words in ("30 rows planned", "25 ok", "5 errors", "0 missing", "size 3 rows", "engine 2 rows"):
        assert words in page.text
    assert "All 25 images." in page.text
    cards = [attrs for attrs in page.all("img") if attrs["src"].startswith("data:image/webp;base64,")]
    assert len(cards) == 25 == len(page.all("img"))
    assert cards[0]["alt"] == "a cat, number 0"
    thumb = Image.open(io.BytesIO(base64.b64decode(cards[0]["src"].split(",")[1])))
    assert thumb.size == (80, 64)
    original = outputs.picture(1000, 64, 80).astype(int)
    assert abs(np.asarray(thumb).astype(int).mean() - original.mean()) < 8
    for words in ("p0", "p3/1", "seed 1000", "80×64"):
        assert words in page.text


def test_a_report_can_be_written_at_any_time(outputs, tmp_path):
    with pytest.raises(InputError, match="there is no such folder, or it is empty"):
        reports_page.write_report(str(tmp_path))
    run_file.put_run(str(tmp_path), outputs.FIELDS)
    assert "no images yet" in write(tmp_path).text
    outputs.make_output(tmp_path, tables(outputs, 10, 3), skip={0, 2})
    page = write(tmp_path)
    assert "20 missing" in page.text and "20 rows are missing. Re-run the command" in page.text
    (tmp_path / "data" / "shard-00000002.parquet").write_bytes(b"PAR1 and no more")
    page = write(tmp_path)
    assert "1 files cannot be read" in page.text and "10 ok" in page.text


def test_nothing_a_row_says_becomes_markup_or_runs(outputs, tmp_path):
    hostile = {"prompt": HOSTILE, "id": HOSTILE, "error_message": HOSTILE, "error_type": HOSTILE}

    def edit(row):
        return row | (hostile if row["status"] == "error" else {"prompt": HOSTILE, "id": HOSTILE})

    outputs.make_output(tmp_path, tables(outputs, 4, 1, edit, errors=(1,)))
    log = RunLog(str(tmp_path), {})
    log.update(
        rows=4, done=4, before=0, errors={HOSTILE: 1}, images=3, retries={HOSTILE: 1}, waits={HOSTILE: 1}
    )
    log.end("failed", HOSTILE)
    page = write(tmp_path)
    assert len(page.all("script")) == 1 and len(page.all("img")) == 3
    known = """html head meta title style body header main section p h1 h2 div b span i svg line text polygon
        polyline code details summary table thead tbody tr th td label input output article button img br
        dialog form script nav"""
    assert {tag for tag, _ in page.elements} <= set(known.split())
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text
    assert page.all("img")[0]["alt"].startswith("<script>alert(1)")


def test_the_page_needs_no_network_and_only_its_own_script_may_run(outputs, tmp_path):
    outputs.make_output(tmp_path, tables(outputs, 2, 1))
    page = write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|//\w+\.\w+|@import|url\(", text.replace("data:image", ""))
    for _, attrs in page.elements:
        for key in ("src", "href"):
            assert attrs.get(key, "data:").startswith("data:")
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    script = text.split("<script>")[1].split("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{allowed}'" in policy


def test_the_gallery_is_drawn_over_all_strata_and_says_so(outputs, tmp_path, monkeypatch):
    for module in (reports_survey, reports_page):
        monkeypatch.setattr(module, "MAX_PICTURES", 12)

    def edit(row):
        rare = row["row_id"] % 50 == 7
        return row | {
            "width": 64,
            "height": 96 if rare else 64,
            "language": "zh" if row["row_id"] == 30 else "en",
        }

    outputs.make_output(tmp_path, tables(outputs, 50, 4, edit))
    page = write(tmp_path)
    assert "12 of 200 images, drawn by a hash" in page.text
    shown = re.findall(r"(\d+)×(\d+) · (en|zh)", page.text)
    assert len(shown) == 12
    assert shown.count(("64", "64", "zh")) == 1 and shown.count(("64", "96", "en")) == 4
    assert "generate en 64×64 195 7" in page.text and "generate en 64×96 4 4" in page.text
    assert (
        page.text.split("run time")[-1].split("report of")[-1][20:]
        == write(tmp_path).text.split("report of")[-1][20:]
    )


def test_the_draw_does_not_depend_on_how_rows_are_found():
    strata = [
        Stratum("generate", "en", 64, 64),
        Stratum("generate", "zh", 64, 64),
        Stratum("edit", "en", 80, 64),
    ]
    places = {
        s: [Place((n * 7919 + k) % 1000, n // 10, n % 10) for n in range(700)] for k, s in enumerate(strata)
    }
    places[strata[2]] = places[strata[2]][:5]

    def survey(order):
        whole = Survey()
        for shard in order:
            part = Survey()
            part.places = {s: [p for p in found if p.shard == shard] for s, found in places.items()}
            whole.add(part)
        return whole

    forward = survey(range(70)).choose(101)
    assert forward == survey(reversed(range(70))).choose(101)
    assert [len(forward[s]) for s in strata] == [48, 48, 5]
    assert all(place in sorted(places[strata[0]])[:48] for place in forward[strata[0]])


def test_up_to_twenty_rows_of_each_kind(outputs, tmp_path):
    outputs.make_output(tmp_path, tables(outputs, 15, 2, errors=range(15)))
    page = write(tmp_path)
    assert "size 30 rows" in page.text and "The first 20 of 30." in page.text
    assert page.text.count("width is 70") == 20


def test_many_kinds_do_not_make_many_tables(outputs, tmp_path):
    edit = lambda row: row | {"error_type": f"kind {row['row_id']}"}  # noqa: E731
    outputs.make_output(tmp_path, tables(outputs, 50, 1, edit, errors=range(50)))
    page = write(tmp_path)
    assert "50 errors" in page.text and "10 rarer kinds are not shown" in page.text


def test_the_page_stays_within_its_bound_whatever_the_rows(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(reports_page, "MAX_BYTES", 200_000)
    monkeypatch.setattr(reports_page, "PICTURE_BYTES", 150_000)
    # Noise compresses badly, and quotes are five times as long as they look.
    edit = lambda row: row | {"prompt": '"' * 5000, "width": 96, "height": 96}  # noqa: E731
    outputs.make_output(tmp_path, tables(outputs, 40, 2, edit))
    page = write(tmp_path)
    size = (tmp_path / "report.html").stat().st_size
    assert 80_000 < size <= 200_000
    assert 10 < len(page.all("img")) < 80
    assert f"{len(page.all('img'))} of 80 images" in page.text


@pytest.mark.parametrize("budget", [200, 1000, 20_000])
def test_a_thumbnail_keeps_to_its_budget(outputs, budget):
    data, _ = outputs_rows.encode_image(outputs.picture(1, 600, 300), "png")
    uri = thumbnail(data, budget)
    small = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    assert len(small) <= budget
    image = Image.open(io.BytesIO(small))
    assert max(image.size) <= gallery.THUMBNAIL and image.size[1] == pytest.approx(2 * image.size[0], abs=2)


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"])
def test_no_picture_gives_no_thumbnail(data):
    assert thumbnail(data, 1000) == ""


def record(seconds, samples, before=0, run=1):
    made = RunRecord(run=run, started="2026-01-01T00:00:00+00:00", updated="2026-01-01T00:00:00+00:00")
    made.seconds, made.samples, made.before = seconds, samples, before
    return made


def points(text):
    return [tuple(float(number) for number in pair.split(",")) for pair in text.split(" ")]


def test_the_graph_shows_rows_a_second_over_the_time_at_work():
    steady = [[float(t), 2 * t, 0] for t in range(1, 61)]
    faster = [[float(t), 120 + 4 * t, 0] for t in range(1, 61)]
    chart = draw_chart([record(60, steady), record(60, faster, before=120, run=2)])
    assert [label for _, label in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    heights = {label: y for y, label in chart.y_ticks}
    line = points(chart.line)
    middle = chart.starts[1][0]
    assert chart.starts[0][1] == 1 and chart.starts[1][1] == 2
    assert {y for x, y in line if x < middle} == {heights["2"]}
    assert {y for x, y in line if x > middle} == {heights["4"]}
    assert [label for _, label in chart.x_ticks] == ["0 s", "30 s", "1 min", "1 min 30 s", "2 min"]
    assert len(line) <= 2 * reports_chart.BINS + 2


@pytest.mark.parametrize(
    "records",
    [[], [record(0, [])], [record(5, [[5.0, 0, 0]])]],
)
def test_without_measurements_there_is_no_graph(records):
    assert draw_chart(records) is None


@pytest.mark.parametrize(
    "samples",
    [
        [[0.0, 0, 0], [1e-9, 5, 0]],
        [[1.0, 0, 0], [2.0, 0, 0]],
        [[1.0, 5, 0], [2.0, 3, 0]],
        [[1.0, 0, 0], [1e7, 10**12, 0]],
    ],
)
def test_odd_measurements_are_drawn_within_the_frame(samples):
    chart = draw_chart([record(samples[-1][0], samples)])
    assert all(0 <= x <= chart.width and 0 <= y <= chart.height for x, y in points(chart.area))
    assert 2 <= len(chart.y_ticks) <= 12 and len(chart.x_ticks) <= 12


def test_records_show_in_the_report(outputs, tmp_path):
    outputs.make_output(tmp_path, tables(outputs, 10, 1))
    now = [1_800_000_000.0]
    log = RunLog(str(tmp_path), {}, lambda: now[0])
    for done in range(11):
        now[0] += 1
        log.update(rows=10, done=done, before=0, errors={}, images=done, retries={"storage": 3})
    log.end("finished")
    page = write(tmp_path)
    assert len(page.all("polyline")) == 1 and "0.909 images/s" in page.text
    assert "storage 3" in page.text and "finished" in page.text


def test_environments_that_differ_are_counted(outputs, tmp_path):
    outputs.make_output(tmp_path, tables(outputs, 4, 2))
    assert "round differently" not in write(tmp_path).text
    table = outputs.result_table(tables(outputs, 4, 2)[1], made=outputs_rows.Producer("r", "f" * 64))
    outputs_shards.write_shard(str(tmp_path), 1, table)
    text = write(tmp_path).text
    assert "made in 2 environments" in text and "4 in ffffffffffff" in text


def test_the_configuration_is_in_the_report(outputs, tmp_path):
    run_file.put_run(
        str(tmp_path), {"task": "generate", "sampling": {"cfg": 3.5}, "templates": {"en": "x" * 1000}}
    )
    text = write(tmp_path).text
    assert "sampling.cfg 3.5" in text and "x" * 299 + "…" in text and "x" * 300 not in text
    assert json.loads((tmp_path / "run.json").read_text())["config"]["templates"]["en"] == "x" * 1000


def test_what_was_passed_over_is_in_the_report(outputs, tmp_path):
    finish(str(tmp_path), outputs.make_output(tmp_path, tables(outputs, 4, 1)))
    assert "Of the manifest" not in write(tmp_path).text
    part = tmp_path / "plan" / "part-00000.json"
    document = json.loads(part.read_text())
    kinds = {f".k{number}": (number + 1, f"<b>{number}.k") for number in range(20)}
    document["opening"]["warnings"] = [skipped_in_words(kinds)]
    part.write_text(json.dumps(document))
    page = write(tmp_path)
    assert "Manifest: 210 files not read as a manifest: 20 .k19 (such as <b>19.k)" in page.text
    assert all(f"{number + 1} .k{number} " in page.text for number in range(20)) and not page.all("b9")


def test_lossy_shortcuts_are_in_the_report(outputs, tmp_path):
    run_file.put_run(str(tmp_path / "exact"), {"task": "generate"})
    assert "lossy shortcuts" not in write(tmp_path / "exact").text
    run_file.put_run(str(tmp_path / "lossy"), {"task": "generate", "mode": "cfg-interval 0.0:0.5"})
    assert "Made with lossy shortcuts: cfg-interval 0.0:0.5." in write(tmp_path / "lossy").text


def test_edits_stand_beside_their_sources(outputs, tmp_path):
    outputs.make_task_output(tmp_path / "out", "edit", bad=(1,))
    page = write(tmp_path / "out")
    pictures = [Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))) for i in page.all("img")]
    assert [picture.size for picture in pictures] == [(60, 40), (64, 48)] * 5
    own, other = (np.asarray(Image.open(tmp_path / "sources" / f"s{n}.png")).astype(int) for n in (0, 1))
    small = np.asarray(pictures[0]).astype(int)
    assert abs(small - own).mean() < 0.8 * abs(small - other).mean()
    assert "All 5 edits." in page.text and "could not be" not in page.text
    assert "a cat, number 0" in page.text and "64×48 · en · cfg 3" in page.text


def test_an_answer_stands_below_its_picture_and_question(outputs, tmp_path):
    outputs.make_task_output(tmp_path / "out", "understand")
    page = write(tmp_path / "out")
    assert page.all("img")[0]["alt"] == f"Source: {tmp_path}/sources/s0.png"
    assert len(page.all("img")) == 6 and "All 6 answers." in page.text
    assert re.search(r"a cat, number 1\s+Score 3/10: row 1, ein Känguru 袋鼠\s+p0/1\s+60×40 · en", page.text)
    assert "understand en 60×40 6 6" in page.text


def test_sources_that_are_gone_or_changed_are_named(outputs, tmp_path):
    outputs.make_task_output(tmp_path / "out", "understand")
    (tmp_path / "sources" / "s0.png").unlink()
    (tmp_path / "sources" / "s1.png").write_bytes((tmp_path / "sources" / "s2.png").read_bytes())
    page = write(tmp_path / "out")
    assert len(page.all("img")) == 2
    assert f"{tmp_path}/sources/s0.png" in page.text and f"{tmp_path}/sources/s1.png" in page.text
    assert "Not shown: 4 sources that are missing or changed." in page.text


def test_each_source_is_asked_for_once_and_only_if_it_is_shown(outputs, tmp_path, monkeypatch):
    for module in (reports_survey, reports_page):
        monkeypatch.setattr(module, "MAX_PICTURES", 8)
    outputs.make_task_output(tmp_path / "out", "edit", rows=40, samples=20)
    asked = []

    def read(uri):
        asked.append(uri)
        return (tmp_path / "sources" / uri.rpartition("/")[2]).read_bytes() if "s0" in uri else b"<html>"

    reports_page.write_report(str(tmp_path / "out"), read)
    page = Page((tmp_path / "out" / "report.html").read_bytes())
    assert sorted(asked) == [f"{tmp_path}/sources/s{n}.png" for n in range(2)]
    # Two thumbnails an edit.
    assert "4 of 40 edits, drawn by a hash" in page.text and 4 <= len(page.all("img")) <= 8


def test_a_slow_store_does_not_hold_a_report_up(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SOURCE_SECONDS", 0.0)
    outputs.make_task_output(tmp_path / "out", "understand")
    reports_page.write_report(str(tmp_path / "out"), lambda uri: pytest.fail("asked"))
    page = Page((tmp_path / "out" / "report.html").read_bytes())
    assert not page.all("img") and "Score 3/10" in page.text


def test_hostile_answers_and_names_of_sources_stay_words(outputs, tmp_path):
    source = {"uri": HOSTILE, "row_id": None}
    plan = outputs.make_task_output(
        tmp_path / "out", "understand", more=lambda n: {"prompt": HOSTILE, "source": source}
    )
    finish(str(tmp_path / "out"), plan)
    page = write(tmp_path / "out")
    assert len(page.all("script")) == 1 and not page.all("img") and not page.all("textarea")
    assert page.text.count("<script>alert(1)</script>") == 12


def test_the_gallery_is_turned_page_by_page(outputs, tmp_path):
    outputs.make_output(tmp_path, tables(outputs, 10, 1))
    page = write(tmp_path)
    assert [attrs.get("id") for attrs in page.all("button")][-3:-1] == ["back", "on"]
    assert [attrs["class"] for attrs in page.all("nav")] == ["pages"] and "hidden" in page.all("nav")[0]


def test_sources_within_the_rows_of_another_output_are_shown(outputs, tmp_path):
    finish(
        str(tmp_path / "first"), outputs.make_output(tmp_path / "first", tables(outputs, 6, 1, errors=(1,)))
    )
    shard = tmp_path / "first" / "data" / "shard-00000000.parquet"
    made = {row["row_id"]: row["image"] for row in pq.read_table(shard).to_pylist()}
    outputs.make_task_output(
        tmp_path / "out", "edit", rows=4, more=lambda n: {"source": {"uri": str(shard), "row_id": n}}
    )
    path = tmp_path / "out" / "data" / "shard-00000000.parquet"
    rows = pq.read_table(path)
    edited = rows.to_pylist()
    for row in edited[:3]:
        # The third names a row that has no picture now, the last one another picture than it was made of.
        row["source"]["sha256"] = hashlib.sha256((made[row["row_id"]] or {}).get("bytes", b"")).hexdigest()
    outputs_shards.write_shard(str(tmp_path / "out"), 0, pa.Table.from_pylist(edited, rows.schema))
    page = write(tmp_path / "out")
    sizes = [Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))).size for i in page.all("img")]
    assert sizes == [(80, 64), (64, 48), (64, 48), (64, 64), (64, 48), (64, 48)]
    assert f"{shard}#1" in page.text and f"{shard}#3" in page.text
