"""Files that we did not write: nothing replaces them, and nobody is told to delete them."""

import ast
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from wallaroo.jobs import cli
from wallaroo.model.checkpoint import TINY
from wallaroo.model.config import Size
from wallaroo.model.errors import InputError
from wallaroo.model.training.recipe import Recipe
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.compact import _remove_others as remove_others
from wallaroo.workflows.datasets.export import export
from wallaroo.workflows.datasets.rules import Rules
from wallaroo.workflows.datasets.select import select
from wallaroo.workflows.outputs import run_file
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports.card import is_card
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.runs import driver, setup
from wallaroo.workflows.scenes.write import write as write_shapes
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.storage.clients import s3_client
from wallaroo.workflows.training.driver import _claim as claim_stage
from wallaroo.workflows.training.driver import _remove_note as remove_note

PROJECT = {
    "README.md": "my project",
    "report.html": "<p>mine",
    "errors.jsonl": "{}",
    "data/table.csv": "1,2",
    "lock.json": '{"name": "a package"}',
}


def fill(folder, files):
    for name, text in files.items():
        storage.write_atomic(storage.join(str(folder), name), text.encode())


def contents(folder):
    return {file.relative: storage.read_bytes(file.path).decode() for file in storage.list_files(str(folder))}


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a red circle"}\n')
    return str(path)


# Outputs


@pytest.mark.parametrize("begin", [driver.run, setup.plan])
def test_a_run_into_a_project_is_refused_and_leaves_it_alone(place, manifest, begin):
    fill(place, PROJECT)
    with pytest.raises(InputError, match="is not empty and not the output of a run") as caught:
        begin(RunConfig(manifest, place))
    named = re.search(r"it holds (.*); give", str(caught.value))[1]
    assert named.endswith(" and more") and set(named.removesuffix(" and more").split(", ")) < set(PROJECT)
    assert contents(place) == PROJECT


@pytest.mark.parametrize(
    "name", ["x", "data/shard-00000000.parquet", "plan/notes.md", "runs/0001.json", ".git/HEAD"]
)
def test_each_file_that_comes_after_run_json_or_never_is_foreign(place, name):
    fill(place, {name: "x"})
    with pytest.raises(InputError, match=f"it holds {re.escape(name)}; give a new or an empty folder"):
        run_file.find_run(place)


def test_what_a_start_leaves_before_run_json_is_its_own(place):
    assert run_file.find_run(place) is None
    names = (
        "plan/part-00000-0123456789abcdef.parquet",
        "plan/part-00000.json",
        "plan/known-0123456789abcdef.parquet",
    )
    fill(place, dict.fromkeys((*names, "plan/pictures-0123456789abcdef.jsonl"), "x"))
    with OutputLock(place, "another"):
        assert run_file.find_run(place) is None
    run_file.put_run(place, {"task": "generate"})
    fill(place, {"notes.txt": "mine"})
    assert run_file.find_run(place)["config"] == {"task": "generate"}


def test_links_pipes_and_leftovers_of_a_local_folder(tmp_path):
    folder = tmp_path / "place"
    (folder / "empty" / "folders").mkdir(parents=True)
    (folder / f"{storage.TEMPORARY}1-2").write_text("of a write that was cut off")
    assert run_file.find_run(str(folder)) is None
    (folder / "data").symlink_to(tmp_path)
    with pytest.raises(InputError, match="it holds data;"):
        run_file.find_run(str(folder))
    (folder / "data").unlink()
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="it holds gone;"):
        run_file.find_run(str(folder))


def test_a_resumed_run_costs_one_request_more_and_a_new_one_two(s3):
    asked = []
    note = lambda request, **_: asked.append((request.method, request.url))  # noqa: E731
    s3_client().meta.events.register("before-send.s3", note)
    try:
        run_file.find_run(f"{s3}/new")
        assert [method for method, _ in asked] == ["GET", "GET"] and "list-type=2" in asked[1][1]
        run_file.put_run(f"{s3}/old", {"task": "generate"})
        fill(f"{s3}/old", {f"data/shard-{shard:08d}.parquet": "x" for shard in range(20)})
        del asked[:]
        run_file.find_run(f"{s3}/old")
        assert [method for method, _ in asked] == ["GET"] and "run.json" in asked[0][1]
    finally:
        s3_client().meta.events.unregister("before-send.s3", note)


def test_a_run_json_of_somebody_else_is_refused_before_the_lock(tmp_path, manifest):
    theirs = {"run.json": '{"scripts": []}', "lock.json": "mine"}
    fill(tmp_path / "out", theirs)
    with pytest.raises(InputError, match=r"run\.json has format None"):
        driver.run(RunConfig(manifest, str(tmp_path / "out")))
    assert contents(tmp_path / "out") == theirs


# Cards


def card_of(outputs, folder):
    finish(str(folder), outputs.make_output(folder, [outputs.plan_table()]))
    return folder / "README.md"


def test_a_card_is_written_anew_until_somebody_changes_it(outputs, tmp_path, caplog):
    card = card_of(outputs, tmp_path / "out")
    written = card.read_bytes()
    assert is_card(written)
    finish(str(tmp_path / "out"), read_plan(str(tmp_path / "out")))
    assert card.read_bytes() == written and not caplog.records
    changed = written.replace(b"6 rows", b"Six rows")
    card.write_bytes(changed)
    finish(str(tmp_path / "out"), read_plan(str(tmp_path / "out")))
    assert card.read_bytes() == changed
    assert f"{card} is kept, since it was written or changed by hand" in caplog.text


def test_a_card_of_the_first_version_is_signed_in_its_turn(outputs, tmp_path):
    card = card_of(outputs, tmp_path / "out")
    new = card.read_bytes()
    old = (Path(__file__).parents[1] / "e2e" / "output_0_1_0" / "output" / "README.md").read_bytes()
    assert is_card(old) and b"Written by" not in old
    card.write_bytes(old)
    finish(str(tmp_path / "out"), read_plan(str(tmp_path / "out")))
    assert card.read_bytes() == new


@pytest.mark.parametrize(
    "data", [b"", b"# Mine\n", b"---\npretty_name: x\n---\nMade with Wallaroo Batch;\n", b"\xff"]
)
def test_a_readme_of_a_person_is_no_card(data):
    assert not is_card(data)


def test_the_card_of_a_selection_is_kept_too(outputs, tmp_path):
    card_of(outputs, tmp_path / "out")
    select(str(tmp_path / "out"), str(tmp_path / "few"), Rules())
    card = tmp_path / "few" / "README.md"
    assert is_card(card.read_bytes())
    card.write_text("mine")
    select(str(tmp_path / "out"), str(tmp_path / "few"), Rules())
    assert card.read_text() == "mine"


# Advice


def test_strays_and_faults_are_to_be_moved_elsewhere(outputs, tmp_path, capsys):
    card_of(outputs, tmp_path / "out")
    pq.write_table(pq.read_table(tmp_path / "out" / "data"), tmp_path / "out" / "data" / "mine.parquet")
    (tmp_path / "out" / "data" / "shard-00000000.parquet").write_bytes(b"mine too")
    with pytest.raises(SystemExit) as left:
        cli.main(["verify", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert left.value.code == 1 and "mine.parquet is not in the plan" in told
    assert "move it elsewhere" in told and "Move the faulty files elsewhere" in told
    assert not re.search("delete|remove", told, flags=re.IGNORECASE)


def test_no_text_advises_to_delete_a_file():
    """Characters of a text may be removed, files and folders not. Docstrings are no messages."""
    advice = re.compile(r"\b(delete|erase|rm -\w+)\b|\bremove (it|them|the (file|folder)s?)\b", re.IGNORECASE)
    allowed = re.compile(r"NUL character: remove it\.|surrogate pair|^DELETE FROM |^delete$")
    found = []
    root = Path(__file__).parents[2]
    for folder in ("wallaroo", "model", "actors", "workflows", "jobs"):
        for file in (root / folder).rglob("*.j2"):
            found += [f"{file.name}: {words[0]}" for words in advice.finditer(file.read_text())]
        for file in (root / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            unsaid = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}
            for node in ast.walk(tree):
                words = node.value if isinstance(node, ast.Constant) and id(node) not in unsaid else ""
                if isinstance(words, str) and advice.search(words) and not allowed.search(words):
                    found.append(f"{file.name}: {words}")
    assert not found
    for commands in (
        cli.cli.commands,
        *(one.commands for one in cli.cli.commands.values() if hasattr(one, "commands")),
    ):
        assert not [name for name, one in commands.items() if advice.search(one.help or "")]


# Other commands


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return left.value.code


def test_prompts_replace_a_file_only_if_told(place, capsys):
    path = f"{place}/cats.jsonl"
    fill(place, {"cats.jsonl": "mine"})
    assert run("prompts", "expand", "a cat", path) == 2
    assert f"{path} exists already: name another file, or --overwrite" in capsys.readouterr().err
    assert contents(place) == {"cats.jsonl": "mine"}
    assert run("prompts", "expand", "a cat", path, "--overwrite") == 0
    assert json.loads(contents(place)["cats.jsonl"])["prompt"] == "a cat"


def test_drawn_scenes_need_an_empty_folder(place):
    theirs = {"train/generate.parquet": "mine", "held-out/notes.txt": "mine"}
    fill(place, theirs)
    with pytest.raises(InputError, match=r"is not empty; it holds .*: give a new folder, or --overwrite"):
        write_shapes(place, 1, 1, 0, [Size(64, 64)])
    assert contents(place) == theirs


def test_an_export_stays_out_of_a_folder_of_other_files(outputs, tmp_path, place):
    card_of(outputs, tmp_path / "out")
    fill(place, {"holiday.txt": "mine"})
    with pytest.raises(InputError, match=r"holds holiday\.txt, which no export of the format 'files' writes"):
        export(str(tmp_path / "out"), place, "files")
    assert contents(place) == {"holiday.txt": "mine"}
    export(str(tmp_path / "out"), place, "files", overwrite=True)
    assert {"holiday.txt", "metadata.jsonl", "p0@0.png"} < {f.relative for f in storage.list_files(place)}


@pytest.mark.parametrize("name", ["metadata.jsonl", "p0@0.png"])
def test_an_export_replaces_no_file_of_its_names_with_other_content(outputs, tmp_path, place, name):
    card_of(outputs, tmp_path / "out")
    fill(place, {name: "mine"})
    with pytest.raises(InputError, match=f"{re.escape(name)} exists with other content .* --overwrite"):
        export(str(tmp_path / "out"), place, "files")
    assert storage.read_bytes(f"{place}/{name}") == b"mine"
    export(str(tmp_path / "out"), place, "files", overwrite=True)
    assert storage.read_bytes(f"{place}/{name}") != b"mine"
    # All is there now, and nothing is in the way.
    again = export(str(tmp_path / "out"), place, "files")
    assert again.unchanged == again.files == 7


def test_an_export_whose_list_grew_or_shrank_is_told(outputs, tmp_path):
    card_of(outputs, tmp_path / "out")
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "files")
    path = tmp_path / "dest" / "metadata.jsonl"
    lines = path.read_bytes()
    for other in (lines[:-1], lines + b"{}\n"):
        path.write_bytes(other)
        with pytest.raises(InputError, match=r"metadata\.jsonl exists with other content"):
            export(str(tmp_path / "out"), str(tmp_path / "dest"), "files")
        assert path.read_bytes() == other


def test_a_selection_leaves_files_of_others_alone(outputs, tmp_path):
    card_of(outputs, tmp_path / "out")
    theirs = {"data/part-00007.parquet": "mine", "notes.txt": "mine"}
    fill(tmp_path / "few", theirs)
    with pytest.raises(InputError, match="is not empty and not a selection"):
        select(str(tmp_path / "out"), str(tmp_path / "few"), Rules())
    assert contents(tmp_path / "few") == theirs
    select(str(tmp_path / "out"), str(tmp_path / "few"), Rules(), overwrite=True)
    # Nor does the next one take a file for a leftover of the first.
    select(str(tmp_path / "out"), str(tmp_path / "few"), Rules())
    assert {name: (tmp_path / "few" / name).read_text() for name in theirs} == theirs


def test_a_selection_is_replaced_by_another_if_so_told(outputs, tmp_path):
    card_of(outputs, tmp_path / "out")
    select(str(tmp_path / "out"), str(tmp_path / "few"), Rules())
    (tmp_path / "few" / "data" / "mine.parquet").write_text("mine")
    split = Rules(split={"train": 0.5, "test": 0.5})
    with pytest.raises(InputError, match=r"holds another selection .* --overwrite"):
        select(str(tmp_path / "out"), str(tmp_path / "few"), split)
    select(str(tmp_path / "out"), str(tmp_path / "few"), split, overwrite=True)
    assert not (tmp_path / "few" / "data" / "shard-00000000.parquet").exists()
    assert (tmp_path / "few" / "data" / "mine.parquet").read_text() == "mine"


def test_training_on_s3_stays_out_of_a_folder_of_other_files(s3):
    theirs = {"notes.txt": "mine", "stop": "mine"}
    fill(f"{s3}/stage", theirs)
    values = {"part": "lm", "base": str(TINY), "folder": f"{s3}/stage", "steps": 1, "rate": 1e-3}
    recipe = Recipe.from_dict(values | {"data": {"generate": "x.parquet"}, "rows": {"generate": 1}})
    with pytest.raises(InputError, match=r"it holds notes\.txt, stop; name another folder in the recipe, or"):
        claim_stage(recipe, False)
    assert contents(f"{s3}/stage") == theirs
    claim_stage(recipe, True)
    remove_note(f"{s3}/stage/stop")
    assert contents(f"{s3}/stage").items() >= theirs.items()
    # It is a stage's from now on.
    claim_stage(recipe, False)
    storage.write_atomic(f"{s3}/stage/stop", b"")
    remove_note(f"{s3}/stage/stop")
    assert set(contents(f"{s3}/stage")) == {"notes.txt", "stage.json"}


def test_compacting_removes_no_file_of_others(outputs, tmp_path):
    folder = tmp_path / "out"
    theirs = {
        "plan/part-notes.md": "mine",
        "plan/known-issues.txt": "mine",
        "data/shard-mine.parquet": "mine",
    }
    card_of(outputs, folder)
    fill(folder, theirs | {"plan/part-00000-0123456789abcdef.parquet": "of a try that was cut off"})
    remove_others(str(folder), read_plan(str(folder)))
    found = {file.relative for file in storage.list_files(str(folder))}
    assert theirs.keys() <= found and "plan/part-00000-0123456789abcdef.parquet" not in found


def test_a_selection_removes_nothing_that_it_did_not_write(outputs, tmp_path):
    card_of(outputs, tmp_path / "out")
    few = tmp_path / "few"
    select(str(tmp_path / "out"), str(few), Rules())
    assert (few / "data" / "shard-00000000.parquet").exists()
    theirs = {"data/part-00007.parquet": "mine", "extra/shard-00000001.parquet": "mine"}
    fill(few, theirs)
    split = Rules(split={"train": 0.5, "test": 0.5})
    select(str(tmp_path / "out"), str(few), split, overwrite=True)
    assert not (few / "data" / "shard-00000000.parquet").exists()
    assert (few / "train" / "shard-00000000.parquet").exists()
    select(str(tmp_path / "out"), str(few), Rules(), overwrite=True)
    assert not (few / "train" / "shard-00000000.parquet").exists()
    assert {name: (few / name).read_text() for name in theirs} == theirs


@pytest.mark.parametrize("noted", [True, False])
def test_a_selection_that_was_cut_short_leaves_no_stale_rows(outputs, tmp_path, noted):
    card_of(outputs, tmp_path / "out")
    few = tmp_path / "few"
    select(str(tmp_path / "out"), str(few), Rules(split={"train": 0.5, "test": 0.5}))
    # As it was before its last step; older versions noted no files.
    path = few / "_selection.json"
    claim = json.loads(path.read_text())
    assert claim.pop("result") and claim["files"]
    if not noted:
        del claim["files"]
    path.write_text(json.dumps(claim))
    select(str(tmp_path / "out"), str(few), Rules())
    rows = {file.relative for file in storage.list_files(str(few)) if file.relative.endswith(".parquet")}
    assert rows == {"data/shard-00000000.parquet"}
