"""The run configuration: where a value comes from, what is refused and in which words."""

import dataclasses
import inspect
import json
import pickle
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wallaroo
from wallaroo.jobs.config import SECTIONS, resolve
from wallaroo.model.config import TASKS, ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.sampling import ALWAYS, Sampling
from wallaroo.workflows.options import OptionError
from wallaroo.workflows.outputs.run_file import put_run
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.runs import setup
from wallaroo.workflows.settings import ALL_STEPS, OPTIONS, REMOVED, RunConfig


def made(flags=None, assignments=(), file=None, environment=None, task="generate") -> RunConfig:
    return resolve(task, "m.jsonl", "out", flags or {}, assignments, file, environment or {})


@pytest.fixture
def run_file(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_defaults_are_those_of_run_config():
    assert made() == RunConfig(manifest="m.jsonl", output="out")


def test_precedence(run_file):
    file = run_file("[sampling]\ncfg = 2\ntop_k = 7\ntop_p = 0.5\n[run]\nseed = 3\n")
    config = made({"cfg": "4"}, ["sampling.cfg=5", "sampling.top_k=8", "sampling.top_k=9"], file)
    assert config.sampling == Sampling(cfg=4.0, temperature=1.0, top_k=9, top_p=0.5)
    assert config.seed == 3


def test_ray_address_comes_from_the_environment_last():
    environment = {"RAY_ADDRESS": "127.0.0.1:6379"}
    assert made(environment=environment).address == "127.0.0.1:6379"
    assert made({"address": "other:1"}, environment=environment).address == "other:1"


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_every_option_reaches_its_field_from_each_origin(option, run_file):
    text = {
        "run.model": "folder",
        "run.preset": "dpg",
        "prompt.text": "make it red",
        "prompt.column": "caption",
        "source.image_column": "photo",
        "run.id_column": "item",
        "source.root": "pictures",
        "source.vision_min_pixels": "1568",
        "source.vision_max_pixels": "100352",
        "run.where": "prompt LIKE '%cat%'",
        "run.max_error_rate": "0.5",
        "prompt.language": "zh",
        "prompt.template_en": 'a "{prompt}"',
        "prompt.template_zh": "画 {prompt}",
        "sampling.top_p": "0.5",
        "sampling.cfg_interval": "0.2:0.8",
        "image.format": "webp",
        "image.png_compression": "small",
        "cluster.replicas": "2:6",
        "cluster.device": "cpu",
        "cluster.address": "auto",
        "image.width": "128",
        "image.height": "128",
    }.get(option.key, "5" if option.kind.metavar else "true")
    number = re.fullmatch(r"[0-9.]+|true", text)
    # These are valid only beside another one.
    beside = {
        "image.width": "image.height=64",
        "image.height": "image.width=64",
        "image.quality": "image.format=jpeg",
    }
    others = [beside[option.key]] if option.key in beside else []
    task = next(task for task in TASKS if option.serves(task))
    section, key = option.key.split(".")
    file = run_file(f"[{section}]\n{key} = {text if number else json.dumps(text)}\n")
    configs = [
        made({option.name: True if text == "true" else text}, others, task=task),
        made({}, [*others, f"{option.key}={text}"], task=task),
        made({}, others, file, task=task),
    ]
    assert configs[0] == configs[1] == configs[2]
    assert getattr(configs[0], option.name) != getattr(made(task=task), option.name)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_defaults_in_the_help_are_true(option):
    stated = re.search(r"\(default ([^;)]+?)(?:; understand: (\d+))?\)", option.help_text)
    if stated is None:
        return
    config = RunConfig("", "", task=option.tasks[0])
    if option.name in ("image_quality", "png_compression", "prompt_column", "image_column", "id_column"):
        assert getattr(config, option.name) is None
        return
    assert option.kind.read(stated[1]) == getattr(config, option.name)
    if stated[2]:
        assert option.kind.read(stated[2]) == getattr(RunConfig("", "", "understand"), option.name)


def test_the_help_states_the_default_of_an_option_with_one():
    stated = {one.name for one in OPTIONS.values() if "(default " in one.help_text}
    plain = {one.name for one in OPTIONS.values() if one.default is not None and one.kind.metavar}
    assert plain < stated


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("sampling.cfg=high", "--set sampling.cfg is 'high', but must be a finite number of at least 0."),
        (
            "sampling.top_k=1.5",
            "--set sampling.top_k is '1.5', but must be a whole number from 0 to "
            "2^31 - 1 (0 keeps all tokens).",
        ),
        ("image.save_tokens=yes", "--set image.save_tokens is 'yes', but must be true or false."),
        (
            "cluster.replicas=1:x",
            "--set cluster.replicas is '1:x', but must be a whole number from 1, or MIN:MAX with "
            "1 <= MIN <= MAX.",
        ),
        ("run.model=", "--set run.model is '', but must be a text that is not empty."),
        ("samplig.cfg=4", "--set: unknown section 'samplig'; did you mean 'sampling'?"),
        (
            "sampling.tempratur=1",
            "--set: unknown key 'tempratur' in section sampling; did you mean 'temperature'?",
        ),
        ("sampling.seed=1", "--set: unknown key 'seed' in section sampling; did you mean 'run.seed'?"),
        ("cfg=4", "--set cfg=4 must read section.key=value, such as sampling.cfg=4."),
        ("sampling.cfg", "--set sampling.cfg must read section.key=value, such as sampling.cfg=4."),
        ("sampling.cfg=nan", "--set sampling.cfg is 'nan', but must be a finite number of at least 0."),
        ("sampling.cfg=-1", "--set sampling.cfg is '-1', but must be a finite number of at least 0."),
        (
            "sampling.temperature=-0.1",
            "--set sampling.temperature is '-0.1', but must be a finite number of at least 0.",
        ),
        (
            "sampling.top_k=-1",
            "--set sampling.top_k is '-1', but must be a whole number from 0 to "
            "2^31 - 1 (0 keeps all tokens).",
        ),
        (
            "sampling.top_p=0",
            "--set sampling.top_p is '0', but must be above 0 and at most 1 (1 keeps all tokens).",
        ),
        (
            "sampling.cfg_interval=0.5",
            "--set sampling.cfg_interval is '0.5', but must be START:END with 0 <= START < END <= 1, "
            "such as 0:0.5.",
        ),
        (
            "sampling.cfg_interval=0.5:0.2",
            "--set sampling.cfg_interval is '0.5:0.2', but must be START:END with 0 <= START < END <= 1, "
            "such as 0:0.5.",
        ),
        (
            "run.weights=int8",
            "--set: run.weights asks for 8-bit weights, which only version 0.1.0 had: leave it out.",
        ),
        (
            "sampling.top_p=1.5",
            "--set sampling.top_p is '1.5', but must be above 0 and at most 1 (1 keeps all tokens).",
        ),
        ("image.width=64", "width is 64, but height is missing: give both, or neither."),
        ("image.height=64", "height is 64, but width is missing: give both, or neither."),
        (
            "image.format=jpg",
            "--set image.format is 'jpg', but must be one of png, webp, jpeg; did you mean 'jpeg'?",
        ),
        ("image.quality=90", "image_quality is 90, but png has none: choose webp or jpeg, or leave it out."),
        ("run.samples=0", "--set run.samples is '0', but must be a whole number from 1 to 10000."),
        ("run.seed=-1", "--set run.seed is '-1', but must be a whole number from 0 to 2^63 - 1."),
        (
            "run.max_error_rate=nan",
            "--set run.max_error_rate is 'nan', but must be from 0 to 1 (0.05 is 5 %).",
        ),
        (
            "cluster.replicas=4:1",
            "--set cluster.replicas is '4:1', but must be a whole number from 1, or MIN:MAX with "
            "1 <= MIN <= MAX.",
        ),
        ("prompt.language=de", "--set prompt.language is 'de', but must be one of en, zh."),
        (
            "prompt.template_en=an image",
            "template_en: The template 'an image' has no {prompt}, so every row would get the same image; "
            "add it.",
        ),
        (
            "prompt.template_zh={prompt}, {target_x}",
            "template_zh: The template has an unknown placeholder '{target_x}', but only {prompt}, "
            "{target_w} and {target_h} exist; did you mean 'target_w'?",
        ),
    ],
)
def test_refusals(assignment, message):
    with pytest.raises(InputError) as refused:
        made({}, [assignment])
    assert str(refused.value) == message


def test_only_png_has_a_compression():
    with pytest.raises(InputError) as refused:
        made({"image_format": "webp", "png_compression": "fast"})
    wanted = "png_compression is fast, but image_format is webp: choose png, or leave it out."
    assert str(refused.value) == wanted


@pytest.mark.parametrize(
    ("given", "earlier", "used"),
    [
        (None, None, "fast"),
        ("small", None, "small"),
        # An output that was begun before there was a choice.
        (None, {}, None),
        ("small", {}, None),
        ("fast", {}, "fast"),
        (None, {"png_compression": "fast"}, "fast"),
        (None, {"png_compression": "small"}, "small"),
        ("small", {"png_compression": "fast"}, "small"),
    ],
)
def test_a_new_output_has_fast_png_and_an_earlier_one_keeps_its_own(given, earlier, used):
    config = RunConfig("m.jsonl", "out", png_compression=given)
    found = setup.resolve(config, None if earlier is None else {"config": earlier})
    assert found.config.png_compression == used == found.meaning.get("png_compression")


@pytest.mark.parametrize(("earlier", "stripped"), [(None, True), ({}, None), ({"strip_quotes": True}, True)])
def test_an_output_of_the_first_version_keeps_the_quotes_of_its_preset(earlier, stripped):
    config = RunConfig("m.jsonl", "out", preset="dpg")
    found = setup.resolve(config, None if earlier is None else {"config": earlier})
    assert found.meaning.get("strip_quotes") == stripped == (found.settings.strip_quotes or None)


def test_filters_can_be_switched_off():
    assert made({}, ["sampling.top_k=0", "sampling.top_p=1", "sampling.temperature=0"]).sampling == Sampling(
        top_k=0, top_p=1.0, temperature=0.0
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "seed = 3",
            "{path}: 'seed' is outside of a section; "
            "sections are run, prompt, sampling, source, image, cluster.",
        ),
        (
            "[sampling]\ncfg = true",
            "sampling.cfg in {path} is True, but must be a finite number of at least 0.",
        ),
        ("[run]\nseed = 1.0", "run.seed in {path} is 1.0, but must be a whole number from 0 to 2^63 - 1."),
        ("[run]\nmodel = 3", "run.model in {path} is 3, but must be a text that is not empty."),
        ("[imge]", "unknown section 'imge'; did you mean 'image'?"),
        ("[image]\nfromat = 'png'", "unknown key 'fromat' in section image; did you mean 'format'?"),
        ("[run\n", "is not valid TOML: "),
        (b"[run]\nmodel = '\xff'", "is not UTF-8, but a run file must be: save it as UTF-8."),
    ],
)
def test_run_file_refusals(run_file, text, message):
    path = run_file(text)
    with pytest.raises(InputError) as refused:
        made(file=path)
    assert message.format(path=path) in str(refused.value)
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_run_file(tmp_path):
    with pytest.raises(InputError, match=r"There is no run file .*absent\.toml\."):
        made(file=str(tmp_path / "absent.toml"))


def test_the_example_names_every_setting(run_file):
    text = (Path(__file__).parents[2] / "jobs" / "examples" / "run.toml").read_text(encoding="utf-8")
    assert made(file=run_file(text)) == made({"samples": "4"})
    whole = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    named = {f"{section}.{key}" for section, table in tomllib.loads(whole).items() for key in table}
    # Each of these two is for a format of its own.
    made(file=run_file(re.sub(r"(?m)^quality.*", "", whole)))
    made(file=run_file(re.sub(r"(?m)^png_compression.*", "", whole).replace('"png"', '"jpeg"')))
    mine = {one.key for one in OPTIONS.values() if one.serves("generate")}
    assert named | {"prompt.template_zh"} == mine


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_an_option_of_another_task_is_refused(option):
    value = {"image.format": "webp", "prompt.template_en": "a {prompt}", "prompt.template_zh": "{prompt}"}
    value |= {"prompt.text": "red", "source.root": "pictures", "image.width": "64", "image.height": "64"}
    value |= {"sampling.cfg_interval": "0:0.5", "image.png_compression": "small"}
    value |= {"source.vision_min_pixels": "1568", "source.vision_max_pixels": "1568"}
    beside = {"image.width": ["image.height=64"], "image.height": ["image.width=64"]}
    beside["image.quality"] = ["image.format=jpeg"]
    text = value.get(option.key, "5" if option.kind.metavar else "true")
    for task in TASKS:
        if not option.serves(task):
            with pytest.raises(InputError, match=f"is for .*, but this is {task}: leave it out"):
                made({}, [*beside.get(option.key, ()), f"{option.key}={text}"], task=task)


def test_a_preset_sets_sampling_samples_and_quotes_and_nothing_else():
    for task, name in (("generate", "geneval"), ("generate", "dpg"), ("edit", "imgedit")):
        config, plain = made({"preset": name}, task=task), made(task=task)
        wanted = {"geneval": Sampling(3, 1, 1000, 1), "dpg": Sampling(4, 1, 1000, 0.95)}
        assert config.sampling == wanted.get(name, Sampling(3, 1, 1000, 1))
        assert (config.strip_quotes, plain.strip_quotes) == (True if name == "dpg" else None, None)
        same = {**dataclasses.asdict(plain.sampling), "samples": plain.samples, "preset": None}
        same["strip_quotes"] = None
        assert dataclasses.replace(config, **same) == plain
        assert config.samples == (4 if task == "generate" else 1)
        # What a preset is called is no part of what a row is.
        spelt = dataclasses.replace(config, preset=None)
        assert spelt.config_digest_fields("") == config.config_digest_fields("")
        assert config.to_dict()["preset"] == name
    told = made({"preset": "vlmevalkit"}, task="understand")
    assert (told.min_pixels, told.max_pixels, told.max_new_tokens) == (1003520, 12845056, 2048)
    assert told.sampling == made(task="understand").sampling
    others = {"min_pixels": "784", "max_new_tokens": "256"}
    told = made({"preset": "vlmevalkit", **others}, task="understand")
    assert (told.min_pixels, told.max_pixels, told.max_new_tokens) == (784, 12845056, 256)
    assert made({"preset": "dpg", "cfg": "5"}).sampling == Sampling(5, 1, 1000, 0.95)
    assert RunConfig("", "", preset="dpg").sampling == Sampling(4, 1, 1000, 0.95)
    with pytest.raises(InputError, match="preset 'imgedit' is for edit, but this is generate"):
        made({"preset": "imgedit"})
    with pytest.raises(InputError, match="did you mean 'geneval'"):
        made({"preset": "genevall"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["vision_min_pixels=783"], "must be a whole number from 784 to 25690112 (784 pixels are a token)."),
        (
            ["vision_max_pixels=25690113"],
            "must be a whole number from 784 to 25690112 (784 pixels are a token).",
        ),
        (
            ["vision_min_pixels=7840", "vision_max_pixels=1568"],
            "min_pixels is 7840, but max_pixels is 1568: give at most that, or a larger max_pixels.",
        ),
        (
            ["vision_max_pixels=25000000"],
            "max_pixels is 25000000, so an image may take 31,887 tokens, but the context of 32,768 has "
            "31,360 left beside prompt and answer: lower max_pixels, max_prompt_tokens or max_new_tokens.",
        ),
    ],
)
def test_limits_of_pixels_have_rules(given, words):
    with pytest.raises(InputError) as caught:
        made({}, [f"source.{one}" for one in given], task="understand")
    assert str(caught.value).endswith(words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"min_pixels": 1003520},
            "min_pixels is 1,003,520, but must be at most max_pixels, which is 188,160 by",
        ),
        (
            {"max_pixels": 784},
            "min_pixels is 12,544 by the checkpoint, but must be at most max_pixels, which is 784:",
        ),
    ],
)
def test_limits_of_pixels_go_with_those_of_the_checkpoint(given, words):
    asked = PlanSettings.of(RunConfig("", "", "understand", **given))
    with pytest.raises(OptionError, match=re.escape(words)):
        asked.check(ModelConfig())
    asked.check(ModelConfig(understand_pixels=(784, 2000000)))


def test_limits_of_pixels_are_part_of_what_a_row_is_where_they_are_given():
    plain = made(task="understand").config_digest_fields("")
    assert not {"min_pixels", "max_pixels"} & plain.keys()
    given = made({"max_pixels": "784"}, task="understand").config_digest_fields("")
    assert given == plain | {"max_pixels": 784}


def test_answers_are_greedy_unless_told_otherwise():
    assert made(task="understand").sampling == Sampling(1, 1, 1, 1)
    assert made({"top_k": "0"}, task="understand").sampling == Sampling(1, 1, 0, 1)
    assert RunConfig("", "", task="understand").sampling == Sampling(1, 1, 1, 1)
    with pytest.raises(InputError, match="answers have no guidance"):
        made({"cfg": "3"}, task="understand")


def test_headings_cover_all_sections():
    assert {one.section for one in OPTIONS.values()} == set(SECTIONS)


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "run_files.json").read_text("utf-8")))
def test_outputs_of_the_first_version_go_on(case, tmp_path):
    """`run.json` and the settings in a plan's parts, as version 0.1.0 wrote them of the same command."""
    # The preset `dpg` did not remove quotes then.
    kept = ["prompt.strip_quotes=false"] if "run.preset=dpg" in case["set"] else []
    config = resolve(case["task"], "/data/m.jsonl", "/data/out", {}, [*case["set"], *kept], None, {})
    fields = config.config_digest_fields("ab" * 32)
    put_run(str(tmp_path), fields, config.to_dict())
    now = json.loads((tmp_path / "run.json").read_text("utf-8"))
    # Options may be added, at the end. One was removed; it was null unless it was given.
    then = case["run.json"]
    for key in REMOVED:
        assert then["options"].pop(key.partition(".")[2]) is None
    now["options"] = dict(list(now["options"].items())[: len(then["options"])])
    assert json.dumps(now, ensure_ascii=False) == json.dumps(then, ensure_ascii=False)
    assert json.dumps(PlanSettings.of(config).meaning()) == json.dumps(case["plan"])
    (tmp_path / "run.json").write_text(json.dumps(then), "utf-8")
    put_run(str(tmp_path), fields)


@pytest.mark.parametrize("mode", ["weights fp8", "cfg-interval 0.0:0.5, weights int8"])
def test_an_output_of_8_bit_weights_is_refused_in_one_sentence(mode, tmp_path):
    fields = made().config_digest_fields("ab" * 32)
    put_run(str(tmp_path), fields | {"mode": mode})
    with pytest.raises(InputError) as caught:
        put_run(str(tmp_path), fields)
    assert str(caught.value) == (
        f"the output {tmp_path} was made with 8-bit weights (its mode is '{mode}'), which only version 0.1.0 "
        "had: resume it with that version, or give another output folder."
    )


NUMBERS = st.floats() | st.integers(-5, 2**40)


# The first call imports torch.
@settings(deadline=None)
@given(st.sampled_from(["cfg", "temperature", "top_k", "top_p"]), NUMBERS)
def test_sampling_of_a_run_has_the_rules_of_a_row(name, value):
    try:
        Sampling(**{name: value}).validate()
    except InputError:
        with pytest.raises(OptionError, match=f"^{name} is "):
            RunConfig("", "", **{name: value})
    else:
        if name != "top_k" or (type(value) is int and value < 2**31):
            assert getattr(RunConfig("", "", **{name: value}).sampling, name) == value


def test_no_step_is_left_out_by_default():
    assert ALL_STEPS == ALWAYS


def test_python_functions_take_the_options_of_their_task_by_name():
    for task in TASKS:
        function = getattr(wallaroo, task)
        named = inspect.signature(function).parameters
        wanted = {one.name for one in OPTIONS.values() if one.serves(task) and not one.run_only}
        assert set(named) == {"ds"} | wanted
        assert wanted >= {"model", "replicas", "samples", "seed", "cfg", "slots", "device"}
        types = {name: named[name].annotation for name in ("model", "samples", "cfg", "slots", "device")}
        assert types == {
            "model": str,
            "samples": int | None,
            "cfg": float | None,
            "slots": int | None,
            "device": str,
        }
        assert not wanted & {"limit", "grace", "address", "incremental"}
        for name in wanted:
            assert named[name].default == OPTIONS[name].default
            assert named[name].annotation is not inspect.Parameter.empty
            assert f"{name}: {OPTIONS[name].help_text}" in function.__doc__


@pytest.mark.parametrize(
    "given, message",
    [
        ({"cgf": 4}, "there is no option 'cgf'; did you mean 'cfg'?"),
        ({"weights": "fp8"}, "weights asks for 8-bit weights, which only version 0.1.0 had: leave it out."),
        ({"cfg": "high"}, "cfg is 'high', but must be a finite number of at least 0."),
        ({"samples": 1.5}, "samples is 1.5, but must be a whole number from 1 to 10000."),
        ({"width": None, "height": 64}, "height is 64, but width is missing: give both, or neither."),
        ({"device": None}, "device is None, but must be one of auto, cpu, cuda."),
        ({"replicas": (2, 1)}, "replicas is (2, 1), but must be a whole number from 1, or MIN:MAX with 1"),
        (
            {"allow_https": True},
            "allow_https is for edit and understand, but this is generate: leave it out.",
        ),
        ({"limit": 3}, "limit is for runs with an output folder, which generate() has not: leave it out."),
    ],
)
def test_python_functions_name_the_option_in_their_errors(given, message):
    with pytest.raises(OptionError) as refused:
        wallaroo.generate(None, **given)
    assert str(refused.value).startswith(message)


def test_digest_fields_are_plain_and_leave_out_where_it_runs():
    here = made({}, ["sampling.cfg=4"])
    there = made(
        {},
        [
            "sampling.cfg=4",
            "cluster.replicas=1:8",
            "cluster.slots=3",
            "cluster.threads=2",
            "run.limit=5",
            "run.where=true",
            "cluster.device=cuda",
            "run.strict=true",
            "run.model=copy",
            "run.max_error_rate=0",
        ],
    )
    assert here.config_digest_fields("abc") == there.config_digest_fields("abc")
    assert json.loads(json.dumps(here.config_digest_fields("abc"))) == here.config_digest_fields("abc")
    assert here.config_digest_fields("abc") != here.config_digest_fields("abd")


@pytest.mark.parametrize(
    "assignment",
    [
        "run.samples=2",
        "run.seed=1",
        "sampling.cfg=1",
        "sampling.top_p=0.9",
        "image.format=webp",
        "image.save_tokens=true",
        "prompt.max_tokens=9",
        "prompt.language=en",
        "prompt.template_zh={prompt}",
        "sampling.cfg_interval=0:0.5",
    ],
)
def test_digest_fields_name_what_changes_a_row(assignment):
    assert made({}, [assignment]).config_digest_fields("") != made().config_digest_fields("")


def test_lossy_shortcuts_are_named_and_their_absence_is_not():
    assert made().mode == "exact" and "mode" not in made().config_digest_fields("")
    spelt = made({}, ["sampling.cfg_interval=0:1"])
    assert spelt.config_digest_fields("") == made().config_digest_fields("")
    lossy = made({}, ["sampling.cfg_interval=0:.75"])
    assert lossy.config_digest_fields("")["mode"] == lossy.mode == "cfg-interval 0.0:0.75"


def test_a_configuration_crosses_processes_and_prints():
    config = made({}, ["prompt.template_en=a {prompt}", "cluster.replicas=1:2"])
    assert pickle.loads(pickle.dumps(config)) == config
    stored = {one.stored.partition(".")[0] for one in OPTIONS.values()}
    assert set(json.loads(json.dumps(config.to_dict()))) == {"manifest", "output", "task"} | stored


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("6h", 21600), ("1h30m", 5400), ("2d", 172800)],
)
def test_a_time_has_units(text, seconds):
    assert made({"deadline": text}).deadline == seconds


@pytest.mark.parametrize("text", ["6 hours", "h", "1h30", "-5s", "1.2.3s", "nan"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InputError, match=r"--deadline is .*but must be a time|deadline is .* at least 0 s"):
        made({"deadline": text})


_TOML = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([one.key for one in OPTIONS.values()]), _TOML, st.binary(max_size=40))
def test_any_run_file_is_a_configuration_or_one_sentence(tmp_path_factory, name, value, junk):
    path = tmp_path_factory.mktemp("any") / "run.toml"
    section, key = name.split(".", 1)
    for content in (junk, f"[{section}]\n{key} = {_toml(value)}\n".encode("utf-8", "surrogatepass")):
        path.write_bytes(content)
        try:
            assert isinstance(made(file=str(path)), RunConfig)
        except InputError as error:
            assert str(error).strip() and len(str(error)) < 2000


def _toml(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value) if isinstance(value, bool | str) else str(value)
