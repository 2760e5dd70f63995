"""Row by row: parameters resolved and seeded, and every fault told in its own sentence."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallaroo.model.checkpoint import TINY, load_config, load_tokenizer
from wallaroo.model.config import Size
from wallaroo.model.errors import InputError
from wallaroo.model.sampling import Sampling
from wallaroo.workflows.plans.columns import GIVEN, PLAN_FIELDS, carried_schema, check_columns, plan_schema
from wallaroo.workflows.plans.rows import derived_seed, plan_rows, sample_counts
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.settings import MAX_SAMPLES, RunConfig

CONFIG = load_config(TINY)
TOKENIZER = load_tokenizer(TINY)


def settings_of(**options):
    return PlanSettings.of(RunConfig("", "", **options))


def plan(table, *, origin="m.csv", **arguments):
    """Planned rows as dicts; settings and arguments of `plan_rows` by name."""
    names = ("numbers", "faults", "raw", "duplicates")
    given_arguments = {name: arguments.pop(name) for name in names if name in arguments}
    if isinstance(table, dict):
        table = pa.table({"prompt": ["a cat"] * max(map(len, table.values()), default=1)} | table)
    planned = plan_rows(table, settings_of(**arguments), CONFIG, TOKENIZER, origin=origin, **given_arguments)
    planned.validate(full=True)
    carried = carried_schema(table.schema, settings_of())
    assert planned.schema.equals(plan_schema(carried), check_metadata=True)
    return planned.to_pylist()


def one(**values):
    """The one planned row of a manifest row with these values beside a prompt."""
    (row,) = plan({name: [value] for name, value in values.items()})
    return row


def test_defaults_are_the_run_s():
    (row,) = plan({"prompt": ["a cat"]}, cfg=2.0, temperature=0.5, top_k=7, top_p=0.9, width=128, height=64)
    assert row == {
        "row_id": 0,
        "shard": 0,
        "id": "m.csv:0",
        "version": 0,
        "sample": 0,
        "status": "planned",
        "error_type": "",
        "error_message": "",
        "prompt": "a cat",
        "width": 128,
        "height": 64,
        "language": "en",
        "seed": derived_seed(0, "m.csv:0", 0, 0),
        "cfg": 2.0,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        GIVEN: None,
    }


def test_a_row_s_own_values_come_first_as_text_or_number():
    text = {"cfg": "1.5", "temperature": "0", "top_k": "0", "top_p": "1", "width": "128", "height": " 64 "}
    numbers = {"cfg": 1.5, "temperature": 0, "top_k": 0.0, "top_p": 1, "width": 128.0, "height": 64}
    wanted = {"cfg": 1.5, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "width": 128, "height": 64}
    for values in (text, numbers):
        row = one(**values, seed="5", language="zh")
        assert row["status"] == "planned"
        assert {name: row[name] for name in wanted} == wanted
        assert (row["seed"], row["language"]) == (5, "zh")


def test_an_empty_cell_is_no_value():
    empty = dict.fromkeys(
        (
            "cfg",
            "temperature",
            "top_k",
            "top_p",
            "width",
            "height",
            "aspect_ratio",
            "seed",
            "language",
            "samples",
        ),
        "",
    )
    blank = {name: [value] for name, value in empty.items()}
    nulls = {name: pa.nulls(1, pa.string()) for name in empty}
    (wanted,) = plan({"prompt": ["a cat"]})
    assert plan(blank) == [wanted] and plan(nulls) == [wanted]


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": ""}, "prompt", "prompt '' is empty"),
        ({"prompt": " \n\u3000\t"}, "prompt", "is empty; give every row a text"),
        ({"prompt": 5}, "prompt", "prompt is 5, which is not text"),
        (
            {"prompt": "x" * 100_000},
            "prompt",
            "prompt has 100,000 characters and .* tokens, more than .* 1,024",
        ),
        ({"prompt": "x" * 20_000_000}, "prompt", "prompt has 20,000,000 characters, more than"),
        ({"width": 64, "height": 64}, "size", r"64x64 .* is not one of the model's; the nearest is 96x96"),
        ({"width": 64}, "size", "width is 64, but height is missing"),
        ({"height": "64"}, "size", "height is 64, but width is missing"),
        ({"width": 0, "height": -1}, "size", "width 0 and height -1 must be positive"),
        ({"width": "wide", "height": 64}, "size", "width is 'wide', but must be a whole number"),
        ({"width": 64.5, "height": 64}, "size", "width is 64.5, but must be a whole number"),
        ({"width": 2**40, "height": 64}, "size", "width is 1099511627776, but must be"),
        ({"aspect_ratio": "wide"}, "size", "aspect_ratio is 'wide', but must be width to height"),
        ({"aspect_ratio": "16:0"}, "size", "aspect_ratio is '16:0'"),
        ({"aspect_ratio": "nano"}, "size", "aspect_ratio is 'nano'"),
        ({"aspect_ratio": -1.5}, "size", "aspect_ratio is -1.5"),
        ({"aspect_ratio": "7:1"}, "size", "'7:1', far from all sizes of the model; the nearest is 128x64"),
        ({"aspect_ratio": 0.1}, "size", "0.1, far from all sizes of the model; the nearest is 64x128"),
        ({"aspect_ratio": "1:1", "width": 96, "height": 96}, "size", "is given with a width or height"),
        ({"cfg": float("inf")}, "sampling", "cfg is inf"),
        ({"cfg": -0.5}, "sampling", "cfg is -0.5"),
        ({"cfg": "much"}, "sampling", "cfg is 'much', but must be a number"),
        ({"cfg": True}, "sampling", "cfg is True, but must be a number"),
        ({"top_k": -1}, "sampling", "top_k is -1, but"),
        ({"top_k": 1.5}, "sampling", "top_k is 1.5, but"),
        ({"top_k": 2**31}, "sampling", "top_k is 2147483648, but must be less than"),
        ({"top_p": 0}, "sampling", "top_p is 0"),
        ({"top_p": 1.01}, "sampling", "top_p is 1.01"),
        ({"temperature": -0.1}, "sampling", "temperature is -0.1"),
        ({"language": "eng"}, "language", "language is 'eng', but must be one of en, zh; did you mean 'en'"),
        ({"language": 1}, "language", "language is 1, but"),
        ({"seed": -1}, "seed", "seed is -1, but must be a whole number from 0 to 2.63"),
        ({"seed": str(2**63)}, "seed", "seed is '9223372036854775808'"),
        ({"samples": 0}, "samples", "samples is 0, but must be a whole number from 1 to 10000"),
        ({"samples": "9" * 5000}, "samples", "samples is '999"),
        ({"id": None}, "id", "id is missing"),
        ({"id": " "}, "id", "id is ' '"),
        ({"id": b"raw"}, "id", "id is b'raw'"),
        ({"id": True}, "id", "id is True"),
    ],
)
def test_a_bad_value_is_an_error_row(values, kind, words):
    row = one(**values)
    assert (row["status"], row["error_type"]) == ("error", kind)
    assert re.search(words, row["error_message"]), row["error_message"]
    assert len(row["error_message"]) < 300 and "\n" not in row["error_message"]


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        (
            {"width": "wide", "height": 64, "cfg": -1, "top_p": 2, "language": "fr", "seed": -1},
            "size",
            [
                "width is 'wide', but must be a whole number from -2147483648 to 2147483647",
                "language is 'fr', but must be one of en, zh",
                "seed is -1, but must be a whole number from 0 to 2^63 - 1",
                "cfg is -1.0, but must be a finite number of at least 0",
                "top_p is 2.0, but must be above 0 and at most 1 (1 keeps all tokens)",
            ],
        ),
        # A number that cannot be read is not missing beside the other one.
        ({"width": 64, "height": "x"}, "size", ["height is 'x', but must be a whole number from -2"]),
        (
            {"prompt": None, "id": None},
            "id",
            [
                "id is missing; give every row an id, or leave the column out",
                "prompt is missing; give every row a text",
            ],
        ),
    ],
)
def test_all_faults_of_a_row_are_told_in_one_sentence(values, kind, words):
    row = one(**values)
    assert (row["status"], row["error_type"]) == ("error", kind)
    told = row["error_message"].split("; also, ")
    assert len(told) == len(words)
    assert all(got.startswith(wanted) for got, wanted in zip(told, words, strict=True)), told
    assert row["error_message"].endswith(".") and ".;" not in row["error_message"]


def test_a_row_that_cannot_be_read_has_no_other_fault():
    (row,) = plan({"prompt": [None]}, faults={0: "is not valid JSON (x)"}, raw={0: '{"prompt": a}'})
    assert row["error_message"] == "Row 0 of m.csv is not valid JSON (x); correct it."
    assert json.loads(row[GIVEN])["raw_line"] == '{"prompt": a}'


def test_a_line_that_could_not_be_read_is_to_be_corrected():
    lines = ['{"prompt": a}', '{"prompt": a}', None, "mine"]
    rows = plan(
        {
            "kind": ["manifest", "manifest", "prompt", None],
            "raw_line": lines,
            "prompt": [None, "a", None, "a cat"],
        }
    )
    assert [row["error_type"] for row in rows] == ["manifest", "", "prompt", ""]
    assert rows[0]["error_message"] == (
        "Row 0 of m.csv is a line that could not be read, as raw_line has it; correct that text, and put the "
        "row that it is in place of this one."
    )
    assert [row["raw_line"] for row in rows] == lines


def test_an_error_row_keeps_what_could_be_read():
    row = one(width=64, height=64, cfg=-1.0, top_k=float("inf"), language="zh", seed=4, tag="x")
    assert row["error_type"] == "size"
    kept = {
        "prompt": "a cat",
        "width": 64,
        "height": 64,
        "cfg": -1.0,
        "top_k": None,
        "language": "zh",
        "seed": 4,
    }
    assert {name: row[name] for name in kept} == kept and row["tag"] == "x"


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"cfg": "much", "language": "fr"}, {"cfg": "much", "language": "fr"}),
        # Neither the defaults of the run nor what follows from a ratio.
        ({"samples": -2, "aspect_ratio": "4:3", "seed": None}, {"samples": -2, "aspect_ratio": "4:3"}),
        ({"prompt": None, "top_k": 3}, {"top_k": 3}),
        ({"prompt": 5}, {"prompt": 5}),
        ({"cfg": float("inf"), "width": 2**40}, {"cfg": "inf", "width": 2**40}),
    ],
)
def test_a_refused_row_keeps_the_values_of_its_manifest(values, kept):
    row = one(**values)
    assert row["status"] == "error"
    given = json.loads(row[GIVEN])
    assert {name: value for name, value in given.items() if value is not None} == kept
    # What was given is refused for the same reason again.
    again = one(**{"prompt": row["prompt"], **given})
    assert (again["error_type"], again["error_message"].replace("'", "")) == (
        row["error_type"],
        row["error_message"].replace("'", ""),
    )


def test_the_question_of_a_run_is_not_that_of_a_refused_row():
    table = pa.table({"image": ["a.png"], "cfg": [5.0]})
    (row,) = plan_rows(table, settings_of(task="understand"), CONFIG, TOKENIZER, folder="/x").to_pylist()
    absent = dict.fromkeys(("samples", "seed", "temperature", "top_k", "top_p", "language"))
    assert row["prompt"] and json.loads(row[GIVEN]) == {"cfg": 5.0, "prompt": None} | absent
    table = pa.table({"image": pa.array([7]), "prompt": ["What?"]})
    (row,) = plan_rows(table, settings_of(task="understand"), CONFIG, TOKENIZER, folder="/x").to_pylist()
    assert (row["error_type"], json.loads(row[GIVEN])) == ("image", {"image": 7, "cfg": None} | absent)


def test_what_could_be_read_of_a_damaged_row_is_not_given():
    (row,) = plan({"cfg": [2.0]}, faults={0: "is not valid UTF-8"})
    assert row["prompt"] == "a cat" and set(json.loads(row[GIVEN]).values()) == {None}


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("16:9", Size(64, 128)),
        ("1.78", Size(64, 128)),
        (1.78, Size(64, 128)),
        ("1", Size(96, 96)),
        (1, Size(96, 96)),
        ("3:4", Size(128, 96)),
        ("0.4", Size(128, 64)),
        ("3:1", Size(64, 128)),
    ],
)
def test_an_aspect_ratio_is_width_to_height(ratio, size):
    row = one(aspect_ratio=ratio)
    assert row["status"] == "planned" and (row["height"], row["width"]) == size


def test_long_prompts_are_counted_in_tokens_and_never_cut():
    prompt = "a cat and a dog " * 200
    tokens = len(TOKENIZER.encode([prompt]))
    assert plan({"prompt": [prompt]}, max_prompt_tokens=tokens)[0]["status"] == "planned"
    row = plan({"prompt": [prompt]}, max_prompt_tokens=tokens - 1)[0]
    assert row["status"] == "error" and row["prompt"] == prompt
    assert f"{tokens:,} tokens" in row["error_message"]


def test_control_tokens_in_a_prompt_are_words():
    prompt = "<|im_end|><|generate_start|><indicator:512> {prompt} {target_w}"
    assert one(prompt=prompt)["prompt"] == prompt and one(prompt=prompt)["status"] == "planned"


# Samples, ids, seeds


def test_samples_make_rows_in_order_with_their_carried_columns():
    rows = plan(
        {"id": ["a", "b", "c", "d"], "samples": ["2", None, "x", "1"], "tag": ["p", "q", "r", "s"]}, samples=3
    )
    assert [(row["row_id"], row["id"], row["sample"], row["tag"], row["error_type"]) for row in rows] == [
        (0, "a", 0, "p", ""),
        (1, "a", 1, "p", ""),
        (2, "b", 0, "q", ""),
        (3, "b", 1, "q", ""),
        (4, "b", 2, "q", ""),
        (5, "c", 0, "r", "samples"),
        (6, "d", 0, "s", ""),
    ]


def test_a_bad_row_gives_as_many_error_rows_as_it_asked_for():
    rows = plan({"id": ["a", "b"], "cfg": [-1, 1]}, samples=2)
    assert [row["status"] for row in rows] == ["error"] * 2 + ["planned"] * 2


def test_rows_that_cannot_be_read_or_repeat_an_id_give_one_row():
    rows = plan(
        {"id": ["a", "b", "a"]},
        samples=4,
        numbers=[7, 8, 9],
        faults={8: "is not valid JSON (x)"},
        duplicates={9},
    )
    assert [row["error_type"] for row in rows] == [""] * 4 + ["manifest", "id"]
    assert rows[4]["error_message"] == "Row 8 of m.csv is not valid JSON (x); correct it."
    assert "'a' repeats that of an earlier row" in rows[5]["error_message"]


def test_ids_are_text():
    table = pa.table({"prompt": ["x"] * 2, "id": pa.array([7.0, 2.5])})
    assert [row["id"] for row in plan(table)] == ["7", "2.5"]
    table = pa.table({"prompt": ["x"] * 2, "id": pa.array([7, 2**62])})
    assert [row["id"] for row in plan(table)] == ["7", str(2**62)]
    assert [row["id"] for row in plan({"prompt": ["x"] * 2}, numbers=[3, 5], origin="d/f.csv")] == [
        "d/f.csv:3",
        "d/f.csv:5",
    ]


def test_a_given_seed_counts_up_with_the_samples():
    rows = plan({"seed": [2**63 - 2]}, samples=3)
    assert [row["seed"] for row in rows] == [2**63 - 2, 2**63 - 1, 0]


def test_a_seed_depends_on_run_id_and_sample_alone():
    table = pa.table({"id": ["a", "b"], "prompt": ["x", "y"]})
    there = {(row["id"], row["sample"]): row["seed"] for row in plan(table, samples=2)}
    other = pa.table({"prompt": ["z", "new", "y"], "id": ["b", "c", "a"], "cfg": [1.0, 2.0, 3.0]})
    here = {(row["id"], row["sample"]): row["seed"] for row in plan(other, samples=2, origin="elsewhere")}
    assert len(set(here.values())) == 6 and all(0 <= seed < 2**63 for seed in here.values())
    assert {key: here[key] for key in there} == there
    assert all(row["seed"] not in there.values() for row in plan(table, samples=2, seed=1))


def test_a_derived_seed_never_changes():
    """Pictures made years apart from one manifest must be the same, so this number stays."""
    assert derived_seed(0, "a", 0, 0) == 4480021094111974574


def test_counts_agree_with_rows():
    table = pa.table({"prompt": ["x"] * 6, "samples": [1, 5, None, -1, MAX_SAMPLES, MAX_SAMPLES + 1]})
    config = settings_of(samples=3)
    counts = sample_counts(table, config, range(6), faults={1})
    assert counts.tolist() == [1, 1, 3, 1, MAX_SAMPLES, 1]
    planned = plan_rows(table, config, CONFIG, TOKENIZER, faults={1: "is bad"})
    assert (
        np.bincount([int(name.split(":")[1]) for name in planned["id"].to_pylist()]).tolist()
        == counts.tolist()
    )


# Columns


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["promt", "tag"], r"no column 'prompt'; did you mean 'promt'\? --prompt-column selects the column"),
        (["text"], "no column 'prompt': it has text. --prompt-column selects the column of the prompts"),
        (["Prompt", "PROMPT"], "did you mean 'Prompt'"),
        (["text", "tag"], "no column 'prompt': it has text, tag"),
        (["prompt\ttag"], "but 'prompt\ttag': separate the columns of a CSV file by commas"),
        (
            ["id|prompt"],
            r"but 'id\|prompt': separate the columns of a CSV file by commas, semicolons",
        ),
        (["id;words"], "separated by commas"),
        ([], "none at all"),
    ],
)
def test_a_missing_prompt_column_names_the_nearest(names, words):
    with pytest.raises(InputError, match=words):
        check_columns(pa.schema([(name, pa.string()) for name in names]), settings_of())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sede", "seed"),
        ("sed", "seed"),
        ("seeds", "seed"),
        ("seet", "seed"),
        ("Seed", "seed"),
        ("ID", "id"),
        ("aspectratio", "aspect_ratio"),
        ("sample", "samples"),
        ("speed", "seed"),
        ("need_", None),
        ("idx", None),
        ("tag", None),
        ("prompts_seen", None),
    ],
)
def test_a_column_a_letter_away_is_warned_of(name, near):
    warnings = check_columns(pa.schema([("prompt", pa.string()), (name, pa.string())]), settings_of())
    assert len(warnings) == (near is not None)
    if near:
        assert f"'{name}'" in warnings[0] and f"'{near}'" in warnings[0]


def test_carried_columns_keep_type_and_value_and_make_way_for_ours():
    table = pa.table(
        {
            "prompt": ["x"],
            "status": pa.array(["mine"]).dictionary_encode(),
            "in_status": [1],
            "when": pa.array([5], pa.timestamp("ns", "Asia/Tokyo")),
            "include": ['[{"class": "cow"}]'],
            "cfg": ['"3.5"'],
        },
    ).replace_schema_metadata({b"wallaroo.json": b'["include", "cfg"]', b"pandas": b"{}"})
    (row,) = plan(table)
    assert (row["in_in_status"], row["in_status"], row["include"]) == ("mine", 1, '[{"class": "cow"}]')
    assert row["cfg"] == 3.5
    carried = carried_schema(table.schema, settings_of())
    assert carried.names == ["in_in_status", "in_status", "when", "include"]
    assert [carried.field(name).type for name in ("in_in_status", "when")] == [
        table.schema.field("status").type,
        pa.timestamp("ns", "Asia/Tokyo"),
    ]
    assert carried.metadata == {b"wallaroo.json": b'["include"]'}


def test_no_rows_are_a_table_too():
    assert plan(pa.table({"prompt": pa.array([], pa.string()), "tag": pa.array([], pa.int8())})) == []


# Settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 64, "height": 64}, "nearest is 96x96"),
        ({"width": 96}, "height is missing"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": MAX_SAMPLES + 1}, "samples is 10001"),
        ({"seed": -1}, "seed is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"language": "de"}, "language is 'de'"),
        ({"cfg": -1}, "cfg is -1"),
        ({"task": "generat"}, "task is 'generat'"),
    ],
)
def test_bad_settings_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        settings_of(**values).check(CONFIG)


VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in PLAN_FIELDS] + ["samples", "aspect_ratio"]), VALUE
    )
)
def test_any_values_are_planned_or_told(values):
    """Each value in the one way that every type has: JSON text."""
    values = {name: value for name, value in values.items() if not isinstance(value, bytes)}
    columns = {"prompt": json.dumps("a cat")} | {name: json.dumps(value) for name, value in values.items()}
    if isinstance(values.get("samples"), int):
        columns.pop("samples")  # thousands of rows would teach no more than one
    table = pa.table({name: [text] for name, text in columns.items()})
    table = table.replace_schema_metadata({b"wallaroo.json": json.dumps(table.column_names)})
    for row in plan(table):
        assert row["status"] in ("planned", "error")
        assert (row["status"] == "error") == bool(row["error_type"]) == bool(row["error_message"])
        if row["status"] == "planned":
            assert Size(row["height"], row["width"]) in CONFIG.size_list()
            Sampling(row["cfg"], row["temperature"], row["top_k"], row["top_p"]).validate()
            assert row["prompt"].strip() and row["language"] in ("en", "zh") and 0 <= row["seed"] < 2**63
