"""Templates and lists: every combination once, named by what is in it."""

import json

import pyarrow.parquet as pq
import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests import expand as module
from wallaroo.workflows.manifests.expand import draw, expand, read_list
from wallaroo.workflows.settings import OptionError


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_combination_in_order(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    count = expand(
        ["a {colour} {animal}", "the {animal}"],
        {"colour": ["red", "blue", "red"], "animal": ["cat", "dog"]},
        str(path),
    )
    found = rows(path)
    assert count == len(found) == 6
    prompts = "a red cat,a red dog,a blue cat,a blue dog,the cat,the dog"
    assert ",".join(row["prompt"] for row in found) == prompts
    assert found[1] | {"id": ""} == {
        "id": "",
        "prompt": "a red dog",
        "language": "en",
        "colour": "red",
        "animal": "dog",
    }


def test_ids_depend_on_the_content_alone(tmp_path):
    one, two = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    expand(["a {x} cat"], {"x": ["red", "blue"]}, str(one))
    expand(["{x}", "a {y}"], {"x": ["green"], "y": ["blue cat", "red cat"]}, str(two))
    first = {row["prompt"]: row["id"] for row in rows(one)}
    second = {row["prompt"]: row["id"] for row in pq.read_table(two).to_pylist()}
    assert first["a red cat"] == second["a red cat"] and len({*first.values(), *second.values()}) == 3
    assert pq.read_table(two).column_names == ["id", "prompt", "language", "x", "y"]


def test_languages_have_lists_of_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    lists = {"animal": ["cat"], "animal.zh": ["猫", "狗"], "n": ["1"]}
    expand(["{n} {animal} here", "{n}只{animal}", "{animal}"], lists, str(path))
    found = [(row["language"], row["prompt"]) for row in rows(path)]
    assert found == [("en", "1 cat here"), ("zh", "1只猫"), ("zh", "1只狗"), ("en", "cat")]


def test_parameters_without_a_place_multiply_and_name_the_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    assert expand(["a cat"], {"cfg": ["2", "4"], "aspect_ratio": ["1:1", "16:9"]}, str(path)) == 4
    assert len({row["id"] for row in rows(path)}) == 4
    assert [(row["cfg"], row["aspect_ratio"]) for row in rows(path)][1] == ("2", "16:9")


def test_braces_and_values_with_braces_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    expand(["{{x}} {x}"], {"x": ["{y}", "{{"]}, str(path))
    assert [row["prompt"] for row in rows(path)] == ["{x} {y}", "{x} {{"]


def test_equal_rows_are_written_once(tmp_path):
    path = tmp_path / "a.jsonl"
    assert expand(["{a}{b} z"], {"a": ["x", "xy"], "b": ["yz", "z"]}, str(path)) == 3
    assert [row["prompt"] for row in rows(path)] == ["xyz z", "xz z", "xyyz z"]


def test_a_sample_is_drawn_by_its_seed_and_kept_in_order(tmp_path):
    lists = {"a": [str(n) for n in range(30)], "b": [str(n) for n in range(30)]}
    whole, one, same, other = (tmp_path / f"{name}.jsonl" for name in "abcd")
    expand(["x {a} {b}"], lists, str(whole))
    assert expand(["x {a} {b}"], lists, str(one), sample=50, seed=1) == 50
    expand(["x {a} {b}"], lists, str(same), sample=50, seed=1)
    expand(["x {a} {b}"], lists, str(other), sample=50, seed=2)
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    order = [row["id"] for row in rows(whole)]
    places = [order.index(row["id"]) for row in rows(one)]
    assert places == sorted(places)
    assert expand(["x {a} {b}"], lists, str(other), sample=10_000) == 900


def test_a_draw_has_so_many_different_numbers_whatever_the_range():
    for total, count in ((1, 1), (10, 9), (10, 10), (1000, 3), (10**30, 100)):
        found = draw(total, count, 7)
        assert len(set(found)) == count == len(found) and found == sorted(found)
        assert min(found) >= 0 and max(found) < total


@pytest.mark.parametrize(
    ("templates", "lists", "words"),
    [
        ([], {}, "There is no template"),
        (["a {color} cat"], {"colour": ["red"]}, r"has \{color\}.*did you mean 'colour'"),
        (["a {x}"], {}, r"no list for it: give one with --set x="),
        (["a cat"], {"colour": ["red"]}, "'colour' is used by no template: put it"),
        (["a cat"], {"cgf": ["2"]}, "'cgf' is used by no template; did you mean 'cfg'"),
        (["a {x} {"], {"x": ["1"]}, "lone '{'"),
        (["a {x}"], {"x": [" "]}, "'x' has no values"),
        (["a {id}"], {"id": ["1"]}, "cannot be named 'id'"),
        (["a {sha256}"], {"sha256": ["1"]}, "a column of results"),
        (["a {x}"], {"x.fr": ["1"]}, "language 'fr'"),
        (["a {x} cat"], {"x.zh": ["1"]}, r"\(en\) has \{x\}"),
        (["{x}{y} a"], {"x": map(str, range(4000)), "y": map(str, range(4000))}, "16,000,000 prompts"),
    ],
)
def test_mistakes_are_told(tmp_path, templates, lists, words):
    with pytest.raises(OptionError, match=words):
        expand(templates, lists, str(tmp_path / "a.jsonl"))
    assert not list(tmp_path.iterdir())


def test_only_manifests_are_written(tmp_path):
    with pytest.raises(OptionError, match=r"must end in \.parquet or \.jsonl"):
        expand(["a"], {}, str(tmp_path / "a.csv"))
    with pytest.raises(OptionError, match="sample is 0"):
        expand(["a"], {}, str(tmp_path / "a.jsonl"), sample=0)


def test_lists_are_read_from_files(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffred, or so\r\n\n  blue \n袋鼠".encode())
    assert read_list(str(path)) == ["red, or so", "blue", "袋鼠"]
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not valid UTF-8"):
        read_list(str(path))
    with pytest.raises(InputError, match="There is no file"):
        read_list(str(tmp_path / "other"))


def test_parquet_is_written_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_ROWS", 3)
    path = tmp_path / "a.parquet"
    assert expand(["x {a}"], {"a": [str(n) for n in range(10)]}, str(path)) == 10
    assert pq.read_table(path).num_rows == 10 and pq.read_metadata(path).num_row_groups == 4
