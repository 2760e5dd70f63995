"""Outputs side by side: which rows belong together."""

import html
import json
import re

import pyarrow.parquet as pq
import pytest

from tests.viewers import serving
from wallaroo.workflows.outputs import layout


@pytest.fixture
def lineage(tmp_path, outputs):
    """An output of 12 rows, two samples an id, and one that was made from it: row 3 could not be read."""
    first, edited = tmp_path / "first", tmp_path / "edited"
    outputs.make_output(first, [outputs.plan_table(6, 6 * shard, shard) for shard in range(2)])
    digests = pq.read_table(first / "data", columns=["sha256"]).column("sha256").to_pylist()

    def source(number):
        # As a run on an output numbers and names its rows; the last row is edited twice.
        number = min(number, 11)
        uri = layout.shard_path(str(first), number // 6)
        named = {"uri": uri, "row_id": number, "sha256": None if number == 3 else digests[number]}
        return {"id": f"p{number // 2}/{number % 2}", "prompt": "make it red", "source": named}

    outputs.make_task_output(
        edited,
        "edit",
        rows=13,
        bad=(3,),
        more=lambda number: source(number) | {"sample": int(number == 12)},
    )
    return first, edited


def pairs(served, query=""):
    """Id and row of each output, of the pairs of a page; the page."""
    page = served.indexed().get(f"/compare{query}").text
    found = []
    for form in page.split('<form class="pair')[1:]:
        (name,) = re.findall(r'name="id" value="([^"]*)"', form)
        sides = re.findall(r'<a href="/(\d+)/rows/(\d+)/(\d+)">', form)
        found.append((html.unescape(name), *((int(shard), int(row)) for _, shard, row in sides)))
    return found, page


def test_a_result_is_beside_the_row_that_it_was_made_from(lineage):
    first, edited = lineage
    wanted = [(f"p{n // 2}", (n // 6, n % 6), (0, n)) for n in range(12)]
    with serving(first, edited) as served:
        found, page = pairs(served)
        assert found == wanted
        assert page.count("make it red") == 12 and "a cat, number 11" in page
        words = " ".join(re.sub("<[^>]*>", "", page).split())
        assert "12 rows in both, 12 differ" in words and "B was made from A: each row" in words
        # The row that could not be read is known by its path.
        assert '<span class="kind">image</span>' in page
        answer = served.get("/compare?show=unvoted&after=0.3").text
        assert answer.count('<form class="pair') == 8
    with serving(edited, first) as served:
        found, page = pairs(served)
        assert found == [(f"{name}/{n % 2}", own, other) for n, (name, other, own) in enumerate(wanted)]
        assert "/0/sources/" not in page  # the second output shows them
        # The row that was edited twice is the source of both.
        assert pairs(served, "?after=0.11")[0] == [("p5/1", (0, 12), (1, 5))]


def test_settings_of_another_task_are_not_compared(lineage):
    first, edited = lineage
    for folder, more in ((first, {"width": 64}), (edited, {"allow_https": False, "prompt": "make it red"})):
        document = json.loads((folder / "run.json").read_text())
        document["config"] |= more | {"seed": len(more)}
        (folder / "run.json").write_text(json.dumps(document))
    with serving(first, edited) as served:
        page = served.indexed().get("/compare").text
        rows = re.findall(r'<tr><th scope="row">(\w+)</th>((?:<td><code>.*?</code></td>)+)</tr>', page)
        shown = {name: re.findall("<code>(.*?)</code>", cells) for name, cells in rows}
        assert shown == {
            "prompt": ["", "make it red"],
            "seed": ["1", "2"],
            "task": ["generate", "edit"],
        }


def test_an_output_is_paired_with_its_source_after_both_were_moved(lineage, tmp_path):
    first, edited = lineage
    moved = tmp_path / "elsewhere"
    first.rename(moved)
    with serving(moved, edited) as served:
        found, _ = pairs(served)
        # What was not read has no digest, and its path leads nowhere now.
        assert [name for name, *_ in found] == [f"p{n // 2}" for n in range(12) if n != 3]


def test_outputs_that_were_not_made_from_each_other_are_paired_by_id(lineage, tmp_path, outputs):
    first, edited = lineage
    other = tmp_path / "other"
    outputs.make_output(
        other, [outputs.plan_table(12)], edit=lambda row: row | {"seed": row["seed"] + row["row_id"] % 2}
    )
    with serving(first, other, edited) as served:
        found, page = pairs(served)
        odd = [n for n in range(12) if n % 2]
        assert [one[1:] for one in found if one[1][1] % 2] == [((n // 6, n % 6), (0, n), (0, n)) for n in odd]
        assert len(found) == 12
        words = " ".join(re.sub("<[^>]*>", "", page).split())
        assert "C was made from A" in words and "B was made" not in words
    # Every other row of the first output is equal to its source, but those of the second are the sources.
    with serving(other, first, edited) as served:
        found, page = pairs(served)
        assert [one[2:] for one in found if one[1][1] % 2] == [((n // 6, n % 6), (0, n)) for n in odd]
        assert len(found) == 12 and "C was made from B" in " ".join(re.sub("<[^>]*>", "", page).split())


def test_outputs_of_other_ids_say_why_nothing_is_shown(tmp_path, outputs):
    outputs.make_output(tmp_path / "a", [outputs.plan_table(4)])
    outputs.make_output(
        tmp_path / "b", [outputs.plan_table(4)], edit=lambda row: row | {"id": f"other {row['id']}"}
    )
    with serving(tmp_path / "a", tmp_path / "b") as served:
        found, page = pairs(served)
        assert found == [] and "they share no id with the same sample, and none was made" in page
        assert "No row that is in all of these outputs matches" in served.get("/compare?q=dog").text


def test_an_answer_is_beside_the_image_that_it_is_about(tmp_path, outputs):
    first, answers = tmp_path / "first", tmp_path / "answers"
    outputs.make_output(first, [outputs.plan_table(6)])
    digests = pq.read_table(first / "data", columns=["sha256"]).column("sha256").to_pylist()

    def source(number):
        uri = layout.shard_path(str(first), 0)
        named = {"uri": uri, "row_id": number, "sha256": digests[number]}
        return {"id": f"p{number // 2}/{number % 2}", "sample": 0, "source": named}

    outputs.make_task_output(answers, "understand", more=source)
    with serving(first, answers) as served:
        found, page = pairs(served)
        assert [own for _, *own in found] == [[(0, n), (0, n)] for n in range(6)]
        assert page.count("/0/pictures/") == 6 and page.count('<span class="answer"') == 6
        assert "row 5, ein Känguru" in html.unescape(page)
