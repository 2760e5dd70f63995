"""The pages of the viewer in a real browser: Debian's chromium, headless, with a profile of its own."""

import itertools
import re
import time

import pyarrow.parquet as pq
import pytest

from tests.viewers import CHROMIUM, browsing, only_from, serving, wait_for
from wallaroo.workflows.outputs import layout, shards
from wallaroo.workflows.outputs.run_log import RunLog
from wallaroo.workflows.reports import status

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium: apt-get install chromium, for the tests of wallaroo view"
)

ALONE = "list => list.every(image => image.complete && image.naturalWidth > 0)"


@pytest.fixture
def many(tmp_path, outputs):
    """120 rows in three shards, 115 of them pictures."""
    tables = [outputs.plan_table(40, 40 * i, i, errors=(3,)) for i in range(3)]
    outputs.make_output(
        tmp_path / "many",
        tables,
        failed={1: (5, 6)},
        edit=lambda row: row | {"tag": "odd" if row["row_id"] % 2 else "even"},
    )
    return tmp_path / "many"


@pytest.fixture
def two(tmp_path, outputs):
    """Two outputs of the same 20 ids, of which rows 4 to 9 of each shard differ."""
    paths = []
    for name, more in (("low", 0), ("high", 7)):

        def edit(row, more=more):
            return row | {"seed": row["seed"] + more} if row["row_id"] % 10 >= 4 else row

        outputs.make_output(tmp_path / name, [outputs.plan_table(10, 10 * i, i) for i in range(2)], edit=edit)
        paths.append(tmp_path / name)
    return paths


def marks(page):
    page.wait_for_load_state()  # a click waits until a page begins, not until it is whole
    return page.eval_on_selector_all("#tiles li", "list => list.map(li => li.dataset.mark)")


def count(page):
    page.wait_for_load_state()
    return " ".join(page.inner_text("#count").split())


def test_grid_search_filter_facets_and_order(many, tmp_path):
    with serving(many) as served, browsing(tmp_path / "profile") as (page, asked):
        served.indexed()
        page.goto(served.base)
        assert page.url == f"{served.base}/0/"
        assert marks(page) == [f"{i // 40}.{i % 40}" for i in range(48)]
        assert count(page) == "1–48 of 120 rows"
        assert page.eval_on_selector_all("#tiles li:nth-child(-n+8) img", ALONE)
        assert page.locator("#tiles li.failed .kind").all_inner_texts() == [
            "size",
            "size",
            "engine",
            "engine",
        ]
        page.click("#next")
        page.click("#next")
        assert marks(page) == [f"2.{i}" for i in range(16, 40)] and count(page) == "97–120 of 120 rows"
        page.click("#previous")
        assert marks(page)[0] == "1.8"

        page.fill("#q", "cat 11")
        page.press("#q", "Enter")
        assert count(page) == "11 rows" and marks(page) == ["0.11", *[f"2.{i}" for i in range(30, 40)]]
        assert page.url.startswith(f"{served.base}/0/?") and "q=cat+11" in page.url
        page.fill("#where", "row_id >= 115")
        page.click("button.main")
        assert marks(page) == [f"2.{i}" for i in range(35, 40)]
        page.fill("#where", "row_id >>> 'x")
        page.click("button.main")
        assert "DuckDB refuses" in page.inner_text("[role=alert]") and marks(page) == []
        assert page.input_value("#where") == "row_id >>> 'x"
        assert [one for one in asked if not one.startswith(served.base)] == [
            "error: Failed to load resource: the server responded with a status of 400 (Bad Request)"
        ]
        asked.clear()
        page.click("text=Clear all")

        facet = page.locator(".facet", has_text="Status")
        assert facet.locator("a").all_inner_texts()[0].split() == ["ok", "115"]
        facet.locator("a", has_text="error").click()
        assert count(page) == "5 rows"
        page.locator(".facet", has_text="Kind of error").locator("a", has_text="engine").click()
        assert marks(page) == ["1.5", "1.6"] and "f.error_type=engine" in page.url
        page.locator(".facet", has_text="Tag").locator("a", has_text="odd").click()
        assert marks(page) == ["1.5"]
        page.locator(".facet a[aria-current]", has_text="engine").click()
        assert marks(page) == ["0.3", "1.3", "1.5", "2.3"]
        page.click("text=Clear all")

        page.select_option("#sort", "random")
        page.fill("#seed", "5")
        page.click("button.main")
        shuffled = marks(page)
        assert shuffled != sorted(shuffled) and "seed=5" in page.url
        page.reload()
        assert marks(page) == shuffled
        page.click("nav.sizes a:has-text('S')")
        assert len(marks(page)) == 96 and marks(page)[:48] == shuffled
        assert only_from(served.base, asked)


def test_one_row_with_its_neighbours_and_its_command(many, tmp_path):
    with serving(many) as served, browsing(tmp_path / "profile") as (page, asked):
        served.indexed()
        page.goto(f"{served.base}/0/?sort=row_id&dir=desc")
        page.click("#tiles li:nth-child(2) a")
        assert page.inner_text("h1") == "p59"
        assert page.eval_on_selector_all(".stage img", ALONE)
        assert '"seed": 1118' in page.inner_text(
            "#again"
        ) and "wallaroo generate again.jsonl" in page.inner_text("#again")
        cells = dict(
            zip(page.locator("th").all_inner_texts(), page.locator("td").all_inner_texts(), strict=True)
        )
        assert cells["row_id"] == "118" and cells["tag"] == "even" and len(cells["sha256"]) == 64
        page.keyboard.press("ArrowRight")
        page.wait_for_url("**/2/37?*")
        page.keyboard.press("ArrowLeft")
        page.wait_for_url("**/2/38?*")
        page.keyboard.press("Escape")
        page.wait_for_url("**/0/?sort=row_id&dir=desc")
        page.goto(f"{served.base}/0/rows/1/5")
        assert page.inner_text("[role=alert]") == "engine: no"
        assert page.inner_text("#again").count('"tag": "odd"') == 1
        assert only_from(served.base, asked)


def test_slider_of_an_edit(tmp_path, outputs):
    outputs.make_task_output(tmp_path / "edits", "edit")
    with serving(tmp_path / "edits") as served, browsing(tmp_path / "profile") as (page, asked):
        page.goto(f"{served.base}/0/rows/0/0")
        page.wait_for_function(f"() => ({ALONE})([...document.querySelectorAll('.stage img')])")
        after = page.locator(".slider .after")
        assert after.evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 50%)"
        page.focus("#slide")
        for _ in range(30):
            page.keyboard.press("ArrowRight")
        assert after.evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 80%)"
        box = page.locator("#slide").bounding_box()
        page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + box["height"] / 2)
        assert 20 <= int(page.input_value("#slide")) <= 30
        sizes = page.eval_on_selector_all(".slider img", "l => l.map(i => [i.clientWidth, i.clientHeight])")
        assert sizes[0] == sizes[1]
        assert "s0.png" in page.inner_text(".line")
        assert only_from(served.base, asked)


def test_question_and_answer(tmp_path, outputs):
    outputs.make_task_output(tmp_path / "answers", "understand")
    with serving(tmp_path / "answers") as served, browsing(tmp_path / "profile") as (page, asked):
        page.goto(f"{served.base}/0/")
        page.wait_for_function(f"() => ({ALONE})([...document.querySelectorAll('#tiles img')])")
        assert "Känguru 袋鼠" in page.inner_text("#tiles li:first-child .answer")
        page.click("#tiles li:first-child a")
        assert page.inner_text(".words .prompt") == "a cat, number 0"
        assert page.inner_text(".words .answer").startswith("Score 0/10: row 0")
        assert only_from(served.base, asked)


def test_comparison_and_votes_by_keys(two, tmp_path):
    with serving(*two) as served, browsing(tmp_path / "profile") as (page, asked):
        served.indexed()
        page.goto(served.base)
        assert page.url == f"{served.base}/compare"
        assert count(page) == "20 rows in both, 12 differ"
        ids = page.eval_on_selector_all(
            "form.pair", "list => list.map(form => form.getAttribute('aria-label'))"
        )
        differing = [n for n in range(20) if n % 10 >= 4]
        assert ids == [f"p{n // 2}" + ("/1" if n % 2 else "") for n in differing]
        page.click("#next")
        assert page.locator("form.pair .facts", has_text="the same in both").count() == 8
        page.click("#first")
        for key in "abatx":
            voted = page.inner_text("#votes")
            page.keyboard.press(key)
            page.wait_for_function("n => document.getElementById('votes').textContent !== n", arg=voted)
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == ids[5]
        page.keyboard.press("ArrowUp")
        page.keyboard.press("u")
        page.wait_for_function("() => document.getElementById('votes').textContent === '4'")
        assert (page.inner_text("#votes-a"), page.inner_text("#votes-b")) == ("2", "1")
        assert "21 % to 94 %" in page.inner_text("#summary")
        path = tmp_path / "low.votes.parquet"
        table = pq.read_table(path).to_pylist()
        low, high = map(str, two)
        assert [row["choice"] for row in table] == [low, high, low, "tie"]
        assert [f"{row['id']}/{row['sample']}" for row in table] == ["p2/0", "p2/1", "p3/0", "p3/1"]
        rows = pq.read_table(layout.shard_path(high, 0), columns=["sha256"]).column(0).to_pylist()
        assert table[0]["sha256"][1] == rows[4]
        # What was voted stays over a new page, and what is left to do can be shown alone.
        page.reload()
        assert page.locator("form.pair >> nth=0").locator("button[aria-pressed=true]").inner_text() == "A low"
        page.click("nav.sizes a:has-text('unvoted')")
        assert page.locator("form.pair").count() == 8
        assert only_from(served.base, asked)


def test_comparison_of_edits_and_answers_shows_their_sources(tmp_path, outputs):
    for task in ("edit", "understand"):
        (tmp_path / task).mkdir()
        for name in ("a", "b"):
            outputs.make_task_output(tmp_path / task / name, task)
        with (
            serving(tmp_path / task / "a", tmp_path / task / "b") as served,
            browsing(tmp_path / f"profile-{task}") as (page, asked),
        ):
            served.indexed()
            page.goto(f"{served.base}/compare")
            page.locator("form.pair >> nth=5").scroll_into_view_if_needed()
            page.wait_for_function(f"() => ({ALONE})([...document.querySelectorAll('.sides img')])")
            assert page.locator(".origin img").count() == 6
            assert page.locator(".sides .answer").count() == (12 if task == "understand" else 0)
            assert only_from(served.base, asked)


def test_live_run_shows_rows_as_they_come(tmp_path, outputs, monkeypatch):
    monkeypatch.setattr(status, "SILENT_SECONDS", 3600.0)
    output = str(tmp_path / "live")
    tables = [outputs.plan_table(4, 4 * i, i) for i in range(3)]
    outputs.make_output(output, tables, skip=(1, 2))
    seconds = itertools.count(time.time())
    with RunLog(output, {}, lambda: next(seconds)) as log:
        log.update(rows=12, done=0, before=0, errors={}, images=0)
        log.update(rows=12, done=4, before=0, errors={}, images=4)
        log.end("running")
        with serving(output) as served, browsing(tmp_path / "profile") as (page, asked):
            page.goto(f"{served.base}/0/")
            assert marks(page) == [f"0.{i}" for i in range(4)]
            line = " ".join(page.inner_text("#live").split())
            assert re.search(r"^running 4 of 12 rows [\d.]+ rows/s .* left", line)
            page.focus("#tiles li:nth-child(2) a")
            shards.write_shard(output, 1, outputs.result_table(tables[1], failed=(2,)))
            log.update(rows=12, done=8, before=0, errors={"engine": 1}, images=7)
            log.end("running")
            page.wait_for_function("() => document.querySelectorAll('#tiles li').length === 8")
            assert marks(page) == [f"{i // 4}.{i % 4}" for i in range(8)]
            assert page.evaluate("document.activeElement.closest('li').dataset.mark") == "0.1"
            page.wait_for_function("() => document.getElementById('live').textContent.includes('error')")
            page.click("text=Newest first")
            page.wait_for_function("() => document.querySelectorAll('#tiles li').length === 8")
            shards.write_shard(output, 2, outputs.result_table(tables[2]))
            log.update(rows=12, done=12, before=0, errors={"engine": 1}, images=11)
            log.end("finished")
            page.wait_for_function("() => document.querySelectorAll('#tiles li').length === 12")
            page.wait_for_function("() => document.querySelector('#live .state').textContent !== 'running'")
            assert only_from(served.base, asked)


def test_narrow_screen(many, two, tmp_path):
    wide = "document.documentElement.scrollWidth"
    with serving(*two, many) as served, browsing(tmp_path / "profile", 400, 800) as (page, asked):
        served.indexed()
        for path in ("/2/", "/2/?tile=s", "/2/?tile=l", "/2/rows/0/0", "/2/rows/0/3", "/compare"):
            page.goto(served.base + path)
            assert page.evaluate(wide) == 400, path
        page.goto(f"{served.base}/2/")
        assert not page.is_visible("#q")
        page.click("label.more")
        page.fill("#q", '"number 7"')
        page.press("#q", "Enter")
        assert count(page).startswith("11 rows")
        assert only_from(served.base, asked)


def test_keyboard_alone(many, tmp_path):
    with serving(many) as served, browsing(tmp_path / "profile") as (page, asked):
        served.indexed()
        page.goto(f"{served.base}/0/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("/")
        page.keyboard.type("cat")
        page.keyboard.press("Enter")
        page.wait_for_url("**/0/?q=cat*")
        page.keyboard.press("n")
        page.wait_for_url("**after=*")
        page.keyboard.press("p")
        page.wait_for_url("**before=*")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        columns = page.evaluate(
            "getComputedStyle(document.getElementById('tiles')).gridTemplateColumns.split(' ').length"
        )
        assert page.evaluate("document.activeElement.closest('li').dataset.mark") == f"0.{1 + columns}"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/0/rows/0/{1 + columns}?q=cat")
        page.keyboard.press("Escape")
        page.wait_for_url("**/0/?q=cat")
        assert only_from(served.base, asked)


def test_without_scripts_pages_filters_and_votes_work(many, two, tmp_path):
    with serving(*two, many) as served, browsing(tmp_path / "profile", scripts=False) as (page, asked):
        served.indexed()
        page.goto(f"{served.base}/2/")
        page.click("text=Next")
        assert page.locator("#tiles li").first.get_attribute("data-mark") == "1.8"
        page.fill("#q", '"number 7"')
        page.click("button.main")
        assert page.locator("#tiles li").count() == 11 and "q=%22number+7%22" in page.url
        page.goto(f"{served.base}/compare")
        wait_for(lambda: page.locator("form.pair").count() > 0)
        page.locator("form.pair >> nth=1").locator("button[value=b]").click()
        assert (
            page.locator("form.pair >> nth=1").locator("button[aria-pressed=true]").inner_text() == "B high"
        )
        assert page.inner_text("#votes") == "1"
        assert only_from(served.base, asked)
