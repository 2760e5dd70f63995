"""README and docs/ name only what exists: commands, flags, keys, columns, files, links, functions."""

import ast
import dataclasses
import importlib.util
import re
import tomllib
from collections import Counter

import click
import pyarrow as pa
import pytest

import wallaroo
from tests.documents import (
    PAGES,
    ROOT,
    all_commands,
    anchors,
    blocks,
    commands,
    inline_code,
    links,
    table,
)
from wallaroo.jobs.cli import cli
from wallaroo.jobs.config import SECTIONS
from wallaroo.model.config import SIZES_512, TASKS
from wallaroo.model.training.recipe import Recipe
from wallaroo.workflows.datasets.export import FORMATS
from wallaroo.workflows.outputs.schema import NOTED_SOURCE_TYPE, result_schema
from wallaroo.workflows.settings import OPTIONS
from wallaroo.workflows.tasks import PRESETS

DOCS = ROOT / "docs"
FOLDERS = ("model", "actors", "workflows", "jobs", "infra", "tests", "docs", "wallaroo", ".ci")
RUNS = ("generate", "edit", "understand", "plan")
RESULTS = result_schema(pa.schema([]), save_tokens=True)


def flags_of(command: click.Command) -> set[str]:
    return {flag for one in command.params if isinstance(one, click.Option) for flag in one.opts} | {"--help"}


def all_flags(command: click.Command = cli) -> set[str]:
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return flags_of(command).union(*map(all_flags, inner))


def fault_of(words: list[str]) -> str:
    """What is wrong with the words after `wallaroo`; empty if nothing is."""
    command: click.Command = cli
    path: list[str] = []
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"there is no command {' '.join([*path, words[0]])}"
        command, path, words = command.commands[words[0]], [*path, words[0]], words[1:]
    if "--" in words:
        inner = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
        if fault := fault_of(inner):
            return fault
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--") and word.partition("=")[0] not in flags_of(command):
            return f"{' '.join(path)} has no {word}"
        if word == "--set" and path[:1] and path[0] in RUNS and following.partition("=")[0] not in KEYS:
            return f"there is no key {following}"
    return ""


KEYS = {one.key for one in OPTIONS.values()}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("generate a.jsonl out --samples 4 --set sampling.cfg=2", ""),
        ("generat a.jsonl out", "there is no command generat"),
        ("data shape out", "there is no command data shape"),
        ("generate a.jsonl out --sample 4", "generate has no --sample"),
        ("generate a.jsonl out --set sampling.cgf=2", "there is no key sampling.cgf=2"),
        ("submit --follow -- generate a.jsonl out --replica 8", "generate has no --replica"),
    ],
)
def test_a_wrong_command_is_found(line, fault):
    assert fault_of(line.split()) == fault


def test_every_command_exists_with_its_flags():
    checked, faults = 0, []
    for where, words in all_commands():
        if words[0] == "wallaroo":
            checked += 1
            faults += [f"{where}: {fault}"] if (fault := fault_of(words[1:])) else []
    assert checked > 100
    assert not faults


def test_every_flag_exists():
    source = "".join((ROOT / "model" / name).read_text() for name in ("bench.py", "gpu_check.py"))
    known = all_flags() | set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
    named = {(page.name, code.split()[0]) for page in PAGES for code in inline_code(page) if code[:2] == "--"}
    assert len(named) > 50
    assert not {(page, flag) for page, flag in named if flag.partition("=")[0] not in known}


def texts_of_the_code():
    """The texts in the code, messages and docstrings among them, with their files."""
    for folder in ("wallaroo", "jobs", "workflows", "actors", "model"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.name in ("bench.py", "gpu_check.py", "dry_run.py"):
                continue  # commands of their own
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield str(file), node.value


def test_every_flag_in_a_message_exists():
    """Remedies in sentences of the code name flags; so do its docstrings."""
    foreign = {"--repo-type", "--local-dir"}  # of `hf download`
    named = {
        flag: file
        for file, text in texts_of_the_code()
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![\w{-])", text)
    }
    assert len(named) > 30
    unknown = {flag: file for flag, file in named.items() if flag not in all_flags() | foreign}
    assert not unknown


def test_every_command_setting_extra_and_page_in_a_message_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    seen, faults = Counter(), []
    for file, text in texts_of_the_code():
        # A command may end where a value is put in.
        for line in re.findall(r"`wallaroo ([a-z][^`]*)", text):
            words = [word for word in line.split() if word.islower() or word.startswith("--")]
            seen["command"] += 1
            faults += [f"{file}: {fault}"] if (fault := fault_of(words)) else []
        for kind, pattern, known in (
            ("extra", r"wallaroo-batch\[([\w,]+)\]", extras),
            ("setting", rf"\bor ((?:{'|'.join(SECTIONS)})\.[a-z_]+)\b", KEYS),
            ("page", r"\bdocs/([\w-]+\.md)\b", {page.name for page in PAGES}),
        ):
            for name in re.findall(pattern, text):
                seen[kind] += 1
                faults += [] if name in known else [f"{file}: {kind} {name}"]
    assert not faults
    assert set(seen) == {"command", "extra", "setting", "page"} and seen["command"] > 20, seen


def test_every_key_of_a_run_file_exists():
    parts = {
        f"{field.name}.{inner.name}"
        for field in [*RESULTS, pa.field("source", NOTED_SOURCE_TYPE)]
        for inner in list_of(field.type)
    }
    pattern = re.compile(rf"({'|'.join(SECTIONS)})\.(?!json|toml)\w+")
    named = {code for page in PAGES for code in inline_code(page) if pattern.fullmatch(code)}
    assert not named - KEYS - parts


def list_of(kind):
    return [kind.field(index) for index in range(kind.num_fields)]


def test_every_make_target_exists():
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {words[1] for _, words in all_commands() if words[0] == "make" and len(words) > 1}
    assert {"demo", "test"} <= named <= known


def test_every_module_exists():
    named = set()
    for _, words in all_commands():
        if "python" in words and "-m" in words:
            named.add(words[words.index("-m") + 1])
    ours = {name for name in named if name.partition(".")[0] in ("wallaroo", "tests")}
    assert ours and not {name for name in ours if importlib.util.find_spec(name) is None}


def named_files() -> set[tuple[str, str, str]]:
    """Page, path and name in that file (perhaps empty) of all that look like a path of the repository."""
    found = set()
    for page in PAGES:
        texts = [*inline_code(page), *(word for block in blocks(page) for word in block.text.split())]
        for text in texts:
            if match := re.fullmatch(rf"((?:{'|'.join(FOLDERS)})/[\w./*-]*)(?::(\w+))?", text.rstrip(",.")):
                found.add((str(page.relative_to(ROOT)), match[1], match[2] or ""))
    return found


def test_every_file_exists():
    named = named_files()
    assert len(named) > 40
    assert not {(page, path) for page, path, _ in named if not list(ROOT.glob(path.rstrip("/") or "."))}


def test_every_function_that_is_named_by_its_file_exists():
    named = {(path, name) for _, path, name in named_files() if name}
    assert len(named) > 15
    for path, name in named:
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.* =", (ROOT / path).read_text(), re.M), (
            path,
            name,
        )


def test_every_test_exists():
    names = {name for page in PAGES for code in inline_code(page) for name in re.findall(r"\btest_\w+", code)}
    assert names
    there = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert not {name for name in names - there if not defined(name)}


def defined(function: str) -> bool:
    return any(f"def {function}(" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents or target == ROOT, link
        if anchor:
            assert anchor in anchors(target), link


def test_readme_leads_to_every_page():
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= set(links(ROOT / "README.md"))


# Tables that repeat what the code says


def sources() -> str:
    files = (
        path for name in ("model", "actors", "workflows", "jobs") for path in (ROOT / name).rglob("*.py")
    )
    return "".join(path.read_text() for path in files)


def code_in(cells: list[str]) -> list[str]:
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_columns_are_those_of_the_schema():
    rows = table(DOCS / "outputs.md", "Columns")
    assert [(row[0].strip("| `"), row[1]) for row in rows] == [
        (field.name, str(field.type)) for field in RESULTS
    ]


def test_kinds_of_errors_are_those_of_the_code():
    rows = table(DOCS / "outputs.md", "Error kinds")
    kinds = {row[0].strip("| `") for row in rows}
    source = sources()
    assert set(re.findall(r'RowError\(\s*"(\w+)"', source)) <= kinds
    assert not {kind for kind in kinds if f'"{kind}"' not in source}


def test_messages_of_the_troubleshooting_table_are_those_of_the_code():
    rows = table(DOCS / "operations.md", "Troubleshooting")
    messages = [text for text in code_in([row[0] for row in rows]) if " " in text and "wallaroo" not in text]
    assert len(messages) > 5
    source = sources()
    for message in messages:
        # What stands between numbers and names, which a message fills in.
        parts = [part.strip() for part in re.split(r"\d+|'\w+'", message)]
        assert all(part in source for part in parts), message


def test_presets_are_those_of_the_code():
    rows = [[cell.strip("| `") for cell in row] for row in table(DOCS / "manifests.md", "Presets")]
    for name, task, cfg, temperature, top_k, top_p, samples, others in rows:
        numbers = {"cfg": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = {key: float(value) for key, value in numbers.items()}
        flags = re.findall(r"--([a-z-]+)(?: (\d+))?", others)
        beside = {flag.replace("-", "_"): int(value) if value else True for flag, value in flags}
        assert PRESETS[name] == (task, sampling, int(samples), beside)
    assert {row[0] for row in rows} == set(PRESETS)


def test_exit_codes_are_those_of_the_command():
    from wallaroo.jobs import terminal as module

    names = ("OK", "FATAL", "USAGE", "ERROR_ROWS", "LOCKED", "STOPPED", "INTERRUPTED")
    rows = table(DOCS / "operations.md", "Exit codes")
    assert [int(row[0].strip("| ")) for row in rows] == [getattr(module, name) for name in names]


def test_sizes_of_the_7b_are_those_of_the_code():
    text = (DOCS / "models.md").read_text().partition("### Sizes of the 7B")[2].partition("###")[0]
    named = {(int(width), int(height)) for width, height in re.findall(r"(\d+)x(\d+)", text)}
    assert named == {(width, height) for height, width in SIZES_512.values()}


def test_keys_of_recipes_exist():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    named = code_in([row[0] for row in table(DOCS / "training.md", "Recipes")])
    assert len(named) > 15
    assert not {name for name in named if name.removesuffix(".TASK") not in fields}


def test_options_of_the_python_functions_are_all_named():
    named = code_in([row[0] for row in table(DOCS / "python.md", "Signature")])
    assert set(named) == {"ds"} | {one.name for one in OPTIONS.values() if not one.run_only}


def test_help_and_docs_name_every_export_format():
    listed = cli.get_command(None, "export").help.partition("\b")[2].partition("\n\n")[0]
    assert set(re.findall(r"^ +([\w-]+) +\S", listed, re.M)) == set(FORMATS)
    rows = {row[0].strip("`"): row[1] for row in table(DOCS / "datasets.md", "Export")}
    wanted = {name: "all" if one.tasks == TASKS else ", ".join(one.tasks) for name, one in FORMATS.items()}
    assert rows == wanted


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page) if block.language == "python"],
    ids=lambda block: block.where,
)
def test_python_blocks_use_names_that_exist(block):
    fields = {one.name for one in OPTIONS.values() if not one.run_only}
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module == "wallaroo":
            assert not [alias.name for alias in node.names if not hasattr(wallaroo, alias.name)]
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in RUNS:
            assert not {word.arg for word in node.keywords} - fields


# How blocks are marked for tests/e2e/test_docs.py


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_markers_of_blocks_are_known(page):
    known = re.compile(r"not run: \S.{9,}|run in background|exit code \d+")
    for block in blocks(page):
        assert not block.marker or known.fullmatch(block.marker), block.where


def test_commands_are_taken_out_of_shell():
    text = "a --b 'c d' # e\nfor n in 1 2; do f $n; done\ncat > x <<'EOF'\ng h\nEOF\ni \\\n  j && k | l &"
    assert list(commands(text)) == [
        ["a", "--b", "c d"],
        ["for", "n", "in", "1", "2"],
        ["f", "$n"],
        ["cat", ">", "x"],
        ["i", "j"],
        ["k"],
        ["l"],
    ]
