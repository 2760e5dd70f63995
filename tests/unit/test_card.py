"""The card: front matter that others' tools read, words of users that stay words."""

import json
import re

import pytest
import yaml

from wallaroo.workflows.outputs import run_file, values
from wallaroo.workflows.outputs.success import RowTotals
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports import card as reports_card
from wallaroo.workflows.reports.finish import finish

HOSTILE = '"\n---\nlicense: mit\n# <img src=x onerror=alert(1)> ``a`b``` [x](y) \x00\u2028\u202e \\" : {}'


def parts(output):
    text = (output / "README.md").read_text()
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def test_a_card_says_what_is_there(outputs, tmp_path):
    tables = [outputs.plan_table(rows=6, first_row=6 * n, shard=n, errors=(1,)) for n in range(2)]
    plan = outputs.make_output(tmp_path, tables, failed={0: (0,)})
    finish(str(tmp_path), plan)
    front, body = parts(tmp_path)
    assert front == {
        "pretty_name": "Wallaroo",
        "language": ["en"],
        "size_categories": ["n<1K"],
        "task_categories": ["text-to-image"],
        "tags": ["synthetic", "wallaroo"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    for words in (
        "12 rows: 9 ok and 3 errors",
        "- `sampling.cfg`: `3.0`",
        f'- `config_digest`: `"{values.digest(outputs.FIELDS)}"`',
        "- language `en`: 9",
        "- 64 x 64 pixels: 6",
        "- 80 x 64 pixels: 3",
        "- errors of kind `size`: 2",
        "- errors of kind `engine`: 1",
        'load_dataset("PATH OF THIS FOLDER", split="train")',
    ):
        assert words in body, words


def test_sources_are_told_by_folder(outputs, tmp_path):
    plan = outputs.make_task_output(tmp_path / "out", "understand", rows=4)
    finish(str(tmp_path / "out"), plan)
    front, body = parts(tmp_path / "out")
    assert front["task_categories"] == ["image-to-text"]
    assert f"- `{tmp_path}/sources/`: 4" in body


def test_many_folders_are_put_together(outputs, tmp_path):
    uri = lambda n: {"source": {"uri": f"s3://b/{n}/x.png", "row_id": n}}  # noqa: E731
    plan = outputs.make_task_output(tmp_path / "out", "edit", rows=30, more=uri)
    counts = finish(str(tmp_path / "out"), plan)
    assert len(counts.folders) == 21 and counts.folders[""] == 10
    assert "- elsewhere: 10" in parts(tmp_path / "out")[1]


def test_words_of_users_stay_words(outputs, tmp_path):
    fields = outputs.FIELDS | {"templates": {"en": HOSTILE}}
    run_file.put_run(str(tmp_path), fields, {"manifest": f"/x/{HOSTILE}", "model": HOSTILE})
    outputs.write_plan(tmp_path, [outputs.plan_table(rows=2, errors=(0, 1))])
    counts = RowTotals(rows=2, errors={HOSTILE: 2})
    reports_card.write_card(str(tmp_path), read_plan(str(tmp_path)), counts)
    front, body = parts(tmp_path)
    assert "license" not in front and "tags" in front
    assert front["pretty_name"].startswith('"\n---\nlicense: mit')
    # Nothing of it begins a line, and all of it is within code.
    assert not re.search(r"^(---|license|# <img)", body, flags=re.MULTILINE)
    outside = re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", body)
    assert "<img" not in outside and "[x](y)" not in outside and body.count("<img") == 5


@pytest.mark.parametrize("text", ["", " ", "`", "``", "a`b", "`a`", "a\nb", "\ud800", "|", "x" * 1000])
def test_a_code_span_holds_its_text(text):
    span = reports_card.code(text)
    fence = re.match("`+", span)[0]
    inner = span[len(fence) : -len(fence)]
    assert span.endswith(fence) and fence not in re.findall("`+", inner)
    assert "\n" not in span and len(span) < 320
    span.encode()


@pytest.mark.parametrize(
    "text", ["", "a: b", '"', "\\", "\n", "\x00\x7f\x85\u2028\ufeff", "袋鼠🦘", "- x", "!!", "' #"]
)
def test_yaml_reads_back_the_name(text):
    front = reports_card.front_matter(text, "generate", [], 1, {"train": "data/*.parquet"})
    assert front.startswith("---\n") and front.endswith("\n---\n") and front.count("\n---") == 1
    assert yaml.safe_load(front[4:-4])["pretty_name"] == text


def test_half_a_character_and_a_long_name_are_no_trouble():
    front = reports_card.front_matter("\ud800" + "x" * 1000, "generate", [], 1, {})
    name = yaml.safe_load(front.encode()[4:-4])["pretty_name"]
    assert name.startswith("\ufffdxxx") and len(name) == 300


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (9_999, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (999_999, "100K<n<1M"),
        (1_000_000, "1M<n<10M"),
        (10_000_000, "10M<n<100M"),
        (999_999_999, "100M<n<1B"),
        (1_000_000_000, "1B<n<10B"),
        (999_999_999_999, "100B<n<1T"),
        (10**12, "n>1T"),
        (10**15, "n>1T"),
    ],
)
def test_sizes_are_the_words_of_the_hub(rows, size):
    front = reports_card.front_matter("x", "generate", [], rows, {})
    assert yaml.safe_load(front[4:-4])["size_categories"] == [size]


def test_the_hubs_own_class_reads_the_card(outputs, tmp_path):
    from huggingface_hub import DatasetCard

    finish(str(tmp_path), outputs.make_output(tmp_path, [outputs.plan_table()]))
    data = DatasetCard.load(tmp_path / "README.md").data
    assert data.tags == ["synthetic", "wallaroo"] and data.size_categories == ["n<1K"]
    assert data.configs[0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]


@pytest.mark.parametrize("marked", [False, True])
def test_a_card_says_what_made_the_pictures_and_how_they_are_marked(outputs, tmp_path, marked):
    fields = outputs.FIELDS | {"model_digest": "m" * 64} | ({"embed_metadata": True} if marked else {})
    run_file.put_run(str(tmp_path), fields, {"model": "/models/wallaroo-7b"})
    outputs.write_plan(tmp_path, [outputs.plan_table()])
    reports_card.write_card(str(tmp_path), read_plan(str(tmp_path)), RowTotals(rows=6, ok=6))
    body = parts(tmp_path)[1]
    assert f"were generated by the model `wallaroo-7b` (digest `{'m' * 64}`)" in body
    assert ("IPTC's digital source type `trainedAlgorithmicMedia`" in body) == marked
    assert ("Their files carry no mark." in body) != marked


def test_a_card_of_answers_says_that_they_are_generated(outputs, tmp_path):
    finish(str(tmp_path / "out"), outputs.make_task_output(tmp_path / "out", "understand", rows=4))
    assert "All texts in `text` were generated by a model." in parts(tmp_path / "out")[1]


def test_datasets_reads_the_folder_by_its_card(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    plan = outputs.make_output(tmp_path / "out", [outputs.plan_table(errors=(1,))])
    finish(str(tmp_path / "out"), plan)
    (tmp_path / "out" / "more.json").write_text(json.dumps({"not": "data"}))
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(found) == 6 and found[0]["image"].size == (80, 64) and found[1]["image"] is None
