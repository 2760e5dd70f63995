"""Training: its forward is the engine's, its rows and losses are the recipe's, and it goes on exactly."""

import base64
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.numerics import logit_length, rounding, sums
from wallaroo.jobs import make_tiny
from wallaroo.model.checkpoint import TINY, load, load_config, load_tokenizer, save
from wallaroo.model.config import Size
from wallaroo.model.engine import Engine, EngineOptions, Request
from wallaroo.model.errors import InputError
from wallaroo.model.images import pixel_image, semantic_image
from wallaroo.model.muon import orthogonal, takes
from wallaroo.model.prompts import edit_prompt, generate_prompt, understand_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.train import (
    NO_LATENT,
    Batch,
    LMJob,
    LMLosses,
    Process,
    Recipe,
    Rows,
    VQJob,
    batches,
    fits,
    fresh_model,
    from_memory,
    kind_means,
    optimise,
    patch_keys,
    samples,
    shuffled,
    spread_codebook,
    stage_config,
    start_model,
    train,
    unlike,
)
from wallaroo.model.vision import encode_image, take_many, tower_plan
from wallaroo.model.vq import to_float


@pytest.fixture(scope="module")
def model():
    return load(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def recipe(**values):
    given = {"part": "lm", "folder": "unused", "base": "", "data": {}, "rows": {}, "steps": 4, "rate": 1e-3}
    return Recipe.from_dict(given | values)


def picture(seed, height, width):
    """An encoded picture with two halves of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3))
    array = np.empty((height, width, 3), np.uint8)
    array[:, : width // 2], array[:, width // 2 :] = colours
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def rows(count=6):
    """Rows of all tasks as a data set has them."""
    made = {"generate": [], "edit": [], "understand": []}
    sizes = [(64, 96), (96, 64), (96, 96)]
    for number in range(count):
        language, prompt = [("en", f"a red circle {number}"), ("zh", f"红色圆形{number}")][number % 2]
        size = sizes[number % len(sizes)]
        row = {"language": language, "prompt": prompt, "picture": picture(number, *size)}
        made["generate"].append(row)
        made["edit"].append(row | {"image": picture(100 + number, *size)})
        made["understand"].append(row | {"image": picture(200 + number, *size), "answer": "red" * number})
    return made


def forced(engine, request):
    [result] = engine.run([request])
    return torch.from_numpy(result.logits)


@pytest.mark.numerics
@pytest.mark.parametrize("task", ["generate", "edit", "understand"])
def test_the_training_forward_is_the_cached_decode(model, tokenizer, task):
    """Teacher-forced logits of rows in one padded batch equal those of the engine, token by token."""
    config, data = model.config, rows()[task]
    maker = Rows(model, tokenizer, recipe(drop=0.0, masked=0.0))
    made = [maker.make(task, row, np.random.default_rng(0)) for row in data]
    losses = LMLosses(model)
    with torch.no_grad():
        hidden = losses.hidden(task, Batch.of(made, config.vision))
    engine = Engine(model, task, EngineOptions(slots=2, group_rows=2, trace=True))
    greedy = Sampling(cfg=1.0, temperature=1.0, top_k=1, top_p=1.0)
    for index, (row, values) in enumerate(zip(made, data, strict=True)):
        language = values["language"]
        target = Image.open(io.BytesIO(values["picture"]))
        size = Size(target.height, target.width)
        source = Image.open(io.BytesIO(values.get("image", values["picture"])))
        bounds = config.edit_pixels if task == "edit" else config.understand_pixels
        semantic = semantic_image(source, *bounds)
        grid = (semantic.shape[0] // 28, semantic.shape[1] // 28)
        common = {"key": 0, "null": None, "seed": 0, "sampling": greedy}
        if task == "generate":
            prompt = generate_prompt(tokenizer, config, values["prompt"], size, language)
            request = Request(prompt=prompt, size=size, **common)
        elif task == "edit":
            prompt = edit_prompt(tokenizer, config, values["prompt"], size, grid, language)
            pixels = pixel_image(source, size)
            request = Request(prompt=prompt, size=size, semantic=semantic, pixels=pixels, **common)
        else:
            prompt = understand_prompt(tokenizer, config, values["prompt"], grid)
            request = Request(prompt=prompt, size=None, semantic=semantic, **common)
        start = len(prompt.ids)
        assert np.array_equal(row.ids[:start], prompt.ids)
        if task == "understand":
            taken = row.ids[start:]
            # A stop token would end the row; up to it all is compared.
            taken = taken[: list(taken).index(config.token_ids["<|im_end|>"])]
            places = np.arange(start, start + len(taken))
            assert model.lm_head is not None
            logits = model.lm_head(hidden[index, places - 1])
        else:
            places = np.flatnonzero(row.image >= 0)
            taken = row.image[places]
            logits = model.image_parts(task)[1](hidden[index, places - 1])
        if len(taken) == 0:
            continue
        request = dataclasses.replace(request, forced=taken.astype(np.int32), max_new_tokens=len(taken))
        wanted = forced(engine, request)[: len(taken)]
        allowed = rounding(wanted, logit_length(model, task))
        torch.testing.assert_close(logits.detach(), wanted, rtol=0, atol=allowed)


@pytest.mark.numerics
def test_many_pictures_at_once_are_seen_as_each_alone(tokenizer):
    """The tower with all windows of a length in one call, and what it works out of the grids made ahead."""
    tower = load(TINY, "understand").visual
    assert tower is not None
    grids = torch.tensor([[1, 6, 6], [1, 10, 4], [1, 8, 10], [1, 6, 6]])
    patches = torch.randn(int(grids.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [
            encode_image(tower, part, (int(grid[1]), int(grid[2])))
            for part, grid in zip(patches.split(grids.prod(1).tolist()), grids, strict=True)
        ]
        take_many(tower)
        plan = tower_plan(load_config(TINY).vision, grids)
        together = tower(patches, grid_thw=grids, **plan).pooler_output
    wanted = torch.cat(alone)
    torch.testing.assert_close(together, wanted, rtol=0, atol=rounding(wanted, sums(tower)))


def test_batches_made_ahead_by_other_processes_are_the_same(model, tokenizer):
    made = recipe(data={"edit": ""}, rows={"edit": 4}, steps=3, accumulate=2, seed=2)
    data = {"edit": rows()["edit"]}
    job = LMJob(model, tokenizer, from_memory(data, made.seed), made)
    job.rows.prepare(data)
    ahead = batches(job, dataclasses.replace(made, workers=2), 1)
    for (theirs,), (ours,) in zip(ahead, batches(job, made, 1), strict=True):
        for name, value in vars(ours["edit"]).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(theirs["edit"], name)), name


def test_response_places_and_targets(model, tokenizer):
    """What each head is to predict, and nothing of the prompt."""
    ids = model.config.token_ids
    maker = Rows(model, tokenizer, recipe(drop=0.0))
    data = rows()
    row = maker.make("generate", data["generate"][0], np.random.default_rng(0))
    height, width = 64 // 16, 96 // 16
    assert (row.image >= 0).sum() == height * width
    text = row.ids[row.target & (row.image < 0)]
    # One token opens the picture, one stands between rows, three close it.
    assert len(text) == height + 3
    ends = [ids["<|generate_start|>"], *[ids["<|end_of_line>|"]] * (height - 1), ids["<|generate_end|>"]]
    assert list(text[:-1]) == [*ends, ids["<|im_end|>"]]
    assert tokenizer.decode(text[-1:]) == "\n"
    answer = maker.make("understand", data["understand"][2], np.random.default_rng(0))
    assert tokenizer.decode(answer.ids[answer.target]) == "redred\n"


def test_dropped_prompts_and_masked_latents(model, tokenizer):
    """A dropped edit has an empty prompt and a black source, and keeps its target."""
    data = rows()["edit"][0]
    kept = Rows(model, tokenizer, recipe(drop=0.0, masked=0.0)).make("edit", data, np.random.default_rng(0))
    dropped = Rows(model, tokenizer, recipe(drop=1.0, masked=0.0)).make(
        "edit", data, np.random.default_rng(0)
    )
    assert len(dropped.ids) < len(kept.ids)
    assert np.array_equal(dropped.image[dropped.image >= 0], kept.image[kept.image >= 0])
    black = Image.new("RGB", (96, 64))
    with torch.no_grad():
        latents = model.vq.encode(to_float(torch.from_numpy(np.array(black)))[None])[0].flatten(1).T
    assert np.array_equal(dropped.latents, latents.numpy())
    maker = Rows(model, tokenizer, recipe(drop=0.0, masked=0.4))
    shares = [
        (maker.make("edit", data, np.random.default_rng(n)).latents != NO_LATENT).any(1).mean()
        for n in range(60)
    ]
    assert min(shares) == 0 and 0.3 < max(shares) < 0.4


@pytest.mark.numerics
@pytest.mark.parametrize("task", ["generate", "edit"])
def test_labels_are_smoothed_more_after_dropped_prompts(model, tokenizer, task):
    kept, dropped = (Rows(model, tokenizer, recipe(drop=drop)) for drop in (0.0, 1.0))
    made = [
        maker.make(task, data, np.random.default_rng(0))
        for maker, data in zip((kept, dropped), rows()[task], strict=False)
    ]
    batch = Batch.of(made, model.config.vision)
    losses = LMLosses(model, 0.01, 0.3)
    with torch.no_grad():
        logits = model.image_parts(task)[1](losses.hidden(task, batch)[:, :-1])
        image = batch.image[:, 1:]
        wanted = sum(
            F.cross_entropy(
                part[tokens >= 0], tokens[tokens >= 0], reduction="sum", label_smoothing=smoothing
            )
            for part, tokens, smoothing in zip(logits, image, (0.01, 0.3), strict=True)
        )
        found = losses({task: batch})[f"{task}_image"]
    # A sum over the codebook for each token, and one over all tokens.
    allowed = rounding(float(wanted), logits.shape[-1] + image.numel())
    assert float(found * (image >= 0).sum()) == pytest.approx(float(wanted), rel=0, abs=allowed)


def test_a_step_has_the_same_rows_however_many_share_it(model, tokenizer):
    """What is dropped, masked and which template is drawn goes with the row, not with who makes it."""
    values = {"data": {"edit": ""}, "rows": {"edit": 8}, "drop": 0.5, "seed": 4}
    values["templates"] = {"edit_en": ["{prompt}", "please {prompt}"], "edit_zh": ["{prompt}", "请{prompt}"]}
    source = from_memory({"edit": rows()["edit"]}, 4)

    def step_of(world, accumulate):
        made = recipe(accumulate=accumulate, **values)
        parts = [
            LMJob(model, tokenizer, source, made, Process(rank, world)).batch(3, piece)[0]["edit"]
            for piece in range(accumulate)
            for rank in range(world)
        ]
        ids = torch.cat([F.pad(part.ids, (0, 400 - part.ids.shape[1])) for part in parts])
        return ids, torch.cat([part.latents for part in parts]), torch.cat([part.patches for part in parts])

    whole = step_of(1, 1)
    for world, accumulate in ((2, 1), (1, 4), (2, 2)):
        assert all(map(torch.equal, step_of(world, accumulate), whole)), (world, accumulate)


@pytest.mark.numerics
def test_pieces_of_a_step_count_by_their_tokens(tmp_path):
    """A step in pieces whose rows have answers of many lengths is the step in one piece."""
    said = []
    for accumulate in (1, 4):
        job, made, lines, report = learning(tmp_path / str(accumulate), steps=3, accumulate=accumulate)
        optimise(job, made, report)
        said.append(losses_of(lines))
    for step, line in said[0].items():
        assert line == pytest.approx(said[1][step], rel=1e-4), step


@pytest.mark.parametrize(("bound", "skipped"), [(1.0, 3), (0.0, 0), (30.0, 0)])
def test_only_a_large_loss_of_pictures_from_text_skips_a_step(tmp_path, bound, skipped):
    job, made, said, report = learning(tmp_path, steps=3, largest_loss=bound)
    before = [parameter.clone() for parameter in job.module.parameters()]
    optimise(job, made, report)
    assert said[3]["skipped_steps"] == skipped
    assert all(map(torch.equal, before, job.module.parameters())) == bool(skipped)


def test_rows_that_are_too_long_or_too_small_are_left_out(model, tokenizer):
    """The bound is the length that a row would have in a batch, with the longest of its templates."""
    values = {"drop": 0.0, "masked": 0.0, "templates": {"generate_en": ["{prompt}", "draw it now: {prompt}"]}}
    for task, given in rows().items():
        for row in given:
            made = Rows(model, tokenizer, recipe(**values))
            longest = max(len(made.make(task, row, np.random.default_rng(n)).ids) for n in range(9))
            for bound, wanted in ((longest, True), (longest - 1, False)):
                stage = recipe(**values, lengths={task: bound})
                assert fits(row, task, tokenizer, model.config, stage) == wanted, (task, bound)
    small = {"prompt": "a cat", "language": "en", "picture": picture(0, 64, 96)}
    for least, height, wanted in ((96, 64, True), (97, 64, False), (96, 40, False)):
        row = small | {"picture": picture(0, height, 96)}
        assert fits(row, "generate", tokenizer, model.config, recipe(least_side=least)) == wanted


def test_a_coin_decides_in_which_language_a_class_is_named(model, tokenizer):
    row = rows()["generate"][0] | {"prompt": "goldfish", "prompt_zh": "金鱼"}
    maker = Rows(model, tokenizer, recipe(drop=0.0))
    texts = [tokenizer.decode(maker.make("generate", row, np.random.default_rng(n)).ids) for n in range(40)]
    chinese = sum("金鱼" in text for text in texts)
    assert 10 < chinese < 30 and chinese + sum("goldfish" in text for text in texts) == 40


def test_a_stage_has_its_own_bounds_of_pixels_and_lengths():
    base = load_config(TINY)
    made = stage_config(base, recipe(semantic_pixels=6272, lengths={"edit": 99}, size=64))
    assert made.edit_pixels == made.understand_pixels == (base.edit_pixels[0], 6272)
    assert made.trained_tokens == base.trained_tokens | {"edit": 99}
    assert stage_config(dataclasses.replace(base, layout="eval"), recipe()).layout == "train"


def learning(folder, **values):
    """A job on the small model that learns three tasks for a few steps, and the losses it reports."""
    made = recipe(
        folder=str(folder),
        data=dict.fromkeys(("generate", "edit", "understand"), "unused"),
        rows={"generate": 4, "edit": 4, "understand": 4},
        **{"accumulate": 2, "warmup": 2, "log_every": 1, "save_every": 2, "frozen": ["vq."]} | values,
    )
    job = LMJob(fresh_model(load(TINY).config, 5), load_tokenizer(TINY), from_memory(rows(), made.seed), made)
    said: dict[int, dict[str, float]] = {}
    return job, made, said, lambda step, numbers: said.__setitem__(step, numbers)


NOT_COMPARED = ("tokens_per_second",)


def losses_of(said):
    return {step: {k: v for k, v in line.items() if k not in NOT_COMPARED} for step, line in said.items()}


@pytest.mark.parametrize("muon", [False, True])
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path, muon):
    job, made, whole, report = learning(tmp_path / "whole", steps=6, muon=muon)
    optimise(job, made, report)
    job, made, first, report = learning(tmp_path / "parts", steps=6, muon=muon)

    class Killed(Exception):
        pass

    def kill(step):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        optimise(job, made, report, after=kill)
    # A new process: nothing is left but the folder.
    job, made, second, report = learning(tmp_path / "parts", steps=6, muon=muon)
    optimise(job, made, report)
    assert min(second) == 3
    assert losses_of(first | second) == losses_of(whole)


@pytest.mark.parametrize("muon", [False, True])
def test_the_losses_fall_and_what_is_frozen_stays(tmp_path, muon):
    job, made, said, report = learning(tmp_path, steps=12, rate=3e-3, muon=muon)
    before = {name: value.clone() for name, value in job.module.model.state_dict().items()}
    optimise(job, made, report)
    assert said[12]["loss"] < 0.8 * said[1]["loss"]
    moved = {
        name for name, value in job.module.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved and not any(name.startswith("vq.") for name in moved)
    assert {name.split(".")[0] for name in moved} == {
        "language_model", "lm_head", "visual", "gen_input_adapter", "gen_image_head", "edit_input_adapter",
        "edit_image_head", "pixel_adapter",
    }  # fmt: skip


@pytest.mark.numerics
def test_the_image_tokenizer_learns_and_goes_on_exactly(tmp_path):
    pictures = [np.array(Image.open(io.BytesIO(picture(n, 32, 32)))) for n in range(40)]

    def run(folder, stop=None):
        made = recipe(
            part="vq", folder=str(folder), data={"vq": ""}, rows={"vq": 8}, steps=24, plain=8, revive=4,
            rate=2e-3, log_every=1, save_every=6, alike=2.0,
        )  # fmt: skip
        job = VQJob(fresh_model(load(TINY).config, 1).vq, pictures, made)
        said: dict[int, dict[str, float]] = {}

        def after(step):
            # Four pictures over what is made of them; looking at them changes nothing.
            assert step % 6 or samples(job, step).shape == (64, 4 * 32, 3)
            if step == stop:
                raise KeyboardInterrupt

        try:
            optimise(job, made, said.__setitem__, after=after)
        except KeyboardInterrupt:
            assert stop
        return said

    whole = run(tmp_path / "whole")
    assert whole[24]["absolute"] < 0.8 * whole[1]["absolute"]
    assert "codebook" in whole[9] and "codebook" not in whole[8]
    assert losses_of(run(tmp_path / "parts", stop=13) | run(tmp_path / "parts")) == losses_of(whole)


def test_latents_of_equal_patches_are_drawn_together():
    plain = np.full((32, 48, 3), 200, np.uint8)
    other = plain.copy()
    other[16:, 32:] = 7
    pixels = [to_float(torch.from_numpy(one[None])) for one in (plain, other, plain[:, :16])]
    keys = [patch_keys(one).tolist() for one in pixels]
    assert len({key for some in keys for key in some}) == 2
    assert [key == keys[0][0] for some in keys for key in some] == [True] * 11 + [False] + [True] * 2
    generator = torch.Generator().manual_seed(3)
    latents = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1).requires_grad_()
    kinds = torch.arange(40) % 7
    optimizer = torch.optim.SGD([latents], lr=1.0)
    for step in range(101):
        made = torch.nn.functional.normalize(latents, dim=-1)
        means, place = kind_means(made.detach(), kinds)
        told = (made @ means.T).argmax(-1) == place
        assert bool(told.all()) == (step == 100) or 0 < step < 100
        optimizer.zero_grad()
        unlike(made, means, place).backward()
        optimizer.step()
    codebook = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    tokens = (means @ codebook.T).argmax(-1)
    right = codebook[tokens][kinds]
    assert unlike(right, codebook, tokens[kinds]) < 0.1 < unlike(-right, codebook, tokens[kinds])


def test_a_common_patch_takes_one_entry_of_the_codebook():
    generator = torch.Generator().manual_seed(5)
    points = torch.nn.functional.normalize(torch.randn(10, 8, generator=generator), dim=-1)
    keys = torch.cat((torch.zeros(991, dtype=torch.int64), torch.arange(1, 10)))
    noise = 0.1 * torch.randn(1000, 8, generator=generator)
    means, place = kind_means(torch.nn.functional.normalize(points[keys] + noise, dim=-1), keys)
    assert place.tolist() == keys.tolist()
    codebook = spread_codebook(means, 10, generator)
    assert len({int(token) for token in (means @ codebook.T).argmax(-1)}) == 10


def test_every_row_once_an_epoch():
    seen = np.concatenate([shuffled(10, first, 4, 3) for first in range(0, 20, 4)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepps": 3}, "unknown key 'stepps'.*steps"),
        ({"part": "five"}, "'five'"),
        ({"rows": {"edit": 3}}, "same tasks"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps is 'many', but must be a whole number"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rows": {"edit": 2.5}}, "a table, each of it a whole number"),
        ({"null_smoothing": 1.5}, "null_smoothing is 1.5, but a share is at most 1"),
        ({"frozen": "vq."}, "a list, each of it a text"),
        (
            {"data": {"edit": ""}, "rows": {"edit": 3}, "accumulate": 2},
            "3 rows of edit.*multiple of 2",
        ),
    ],
)
def test_wrong_recipes_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        recipe(**values)


RECIPES = """
base = "{base}"
rows.generate = 2
data.generate = "{data}"
rate = 1e-3
log_every = 1
largest_loss = 0

[first]
part = "lm"
folder = "{folder}/first"
tasks = ["generate", "understand"]
size = 64
steps = 2
sample_every = 2

[second]
part = "lm"
folder = "{folder}/second"
start = "{folder}/first/checkpoint"
steps = 2
"""


def test_a_step_of_muon_turns_and_stretches_alike():
    """All singular values of what it takes of a gradient are near one, whatever the gradient's are."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((24, 40), (40, 24)):
        wide = torch.randn(shape, generator=generator)
        left, _, right = torch.linalg.svd(wide, full_matrices=False)
        matrix = left @ torch.diag(torch.linspace(1.0, 0.03, 24)) @ right
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert values.min() > 0.6 and values.max() < 1.3
        assert torch.linalg.matrix_norm(orthogonal(matrix) - left @ right, 2) < 0.4


def test_muon_takes_matrices_that_are_no_tables(model):
    taken = {name for name, parameter in model.named_parameters() if takes(name, parameter)}
    layer = "language_model.layers.0."
    assert {f"{layer}self_attn.qkv_proj.weight", f"{layer}mlp.down_proj.weight"} <= taken
    assert {"visual.blocks.0.attn.qkv.weight", "gen_image_head.0.weight"} <= taken
    tables = ("embed_tokens.weight", "lm_head.weight", "image_head.2.weight", "norm.weight", ".bias")
    assert not any(name.endswith(tables) or "conv" in name for name in taken)


def recipes(folder):
    """A file of recipes in a folder, with the rows that they name."""
    lines = folder / "generate.jsonl"
    with open(lines, "w", encoding="utf-8") as file:
        for row in rows()["generate"]:
            file.write(json.dumps({**row, "picture": base64.b64encode(row["picture"]).decode()}) + "\n")
    text = RECIPES.format(base=TINY, data=lines.with_suffix(".parquet"), folder=folder)
    (folder / "recipes.toml").write_text(text)
    return folder / "recipes.toml"


@pytest.mark.numerics
def test_two_processes_without_ray_do_what_one_does(tmp_path):
    file = recipes(tmp_path)
    made = [
        train(
            dataclasses.replace(Recipe.from_file(file, "first"), folder=str(tmp_path / name), muon=True),
            workers=workers,
        )
        for name, workers in (("one", 1), ("two", 2))
    ]
    losses = [
        [json.loads(line)["loss"] for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
        for folder in made
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two, before = (
        torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
        for model in (*map(load, made), start_model(Recipe.from_file(file, "first")))
    )
    # A weight whose gradient is nothing but rounding moves by the whole rate in each step, either way. There
    # are few of those, so that on average the weights differ by far less than they were moved.
    apart = (one - two).abs()
    assert apart.max() <= 2 * 2 * 1e-3
    assert apart.mean() < 1e-3 * (one - before).abs().mean()


def test_processes_that_cannot_share_a_step_are_refused(tmp_path):
    with pytest.raises(InputError, match="a multiple of 5"):
        train(Recipe.from_file(recipes(tmp_path), "first"), workers=5)


def test_stages_follow_each_other_from_a_file_without_ray(tmp_path):
    """A square stage, then all sizes with the parts for editing drawn anew; each gives a checkpoint."""
    recipes(tmp_path)
    said: list[str] = []
    first = train(Recipe.from_file(tmp_path / "recipes.toml", "first"), said.append)
    assert said[-1].startswith("step 2 of 2: loss ") and said[-1].endswith("tokens/s")
    config = load_config(first)
    assert (config.size_list(), config.line_break) == ([Size(64, 64)], False)
    assert config.tasks == ("generate", "understand")
    assert Image.open(first.parent / "sample-000002.png").size == (8 * 64, 64)
    metrics = (first.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2]
    second = train(Recipe.from_file(tmp_path / "recipes.toml", "second"), said.append)
    assert load_config(second).size_list() == load_config(TINY).size_list()
    before, after = load(first).language_model.state_dict(), load(second).language_model.state_dict()
    assert not all(torch.equal(before[name], after[name]) for name in after)
    assert all(torch.allclose(before[name], after[name], atol=0.01) for name in after)
    assert train(Recipe.from_file(tmp_path / "recipes.toml", "second"), said.append) == second
    assert "nothing to do" in said[-1]
    with pytest.raises(InputError, match=r"no stage 'secnd'.*second"):
        Recipe.from_file(tmp_path / "recipes.toml", "secnd")


def test_the_recipes_that_come_along_can_be_followed():
    """Each stage starts from the one before, and the published ones can be shared by eight workers."""
    folder = Path(make_tiny.__file__).parent / "train"
    for name, workers, stages in (
        ("tiny", 1, make_tiny.STAGES),
        ("published", 8, ("stage-1", "stage-2", "stage-3-1", "stage-3-2", "stage-4")),
    ):
        made = [Recipe.from_file(folder / f"{name}.toml", stage) for stage in stages]
        assert all(one.share(workers) for one in made)
        assert [one.start for one in made[1:]] == [f"{one.folder}/checkpoint" for one in made[:-1]]
    rates = [(one.rate, one.size, one.lengths["generate"], one.semantic_pixels) for one in made]
    assert rates == [
        (1e-4, 384, 832, 0), (1e-4, 384, 768, 254016), (4e-5, 512, 1600, 254016), (1e-5, 0, 1632, 254016),
        (1e-5, 0, 1632, 188160),
    ]  # fmt: skip


def test_a_picture_that_cannot_be_decoded_is_one_sentence(model, tokenizer):
    row = rows()["generate"][0]
    for bad in (b"no picture", row["picture"][:60]):
        with pytest.raises(InputError, match=r"cannot be decoded \(.*leave its row out"):
            Rows(model, tokenizer, recipe()).make(
                "generate", row | {"picture": bad}, np.random.default_rng(0)
            )


def test_a_start_of_another_architecture_is_refused(tmp_path):
    config = load_config(TINY)
    other = dataclasses.replace(config, vq=dataclasses.replace(config.vq, codebook_size=256))
    tokenizer_json = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    save(fresh_model(other, 0), other, tokenizer_json, tmp_path / "other")
    made = recipe(folder=str(tmp_path / "out"), base=str(TINY), start=str(tmp_path / "other"))
    with pytest.raises(InputError, match="same architecture"):
        train(made)


def test_a_part_begins_as_a_copy_of_another():
    copied = {"edit_image_head": "gen_image_head", "pixel_adapter": "gen_input_adapter"}
    made = start_model(recipe(base=str(TINY), copied=copied)).state_dict()
    given = load(TINY).state_dict()
    for name, tensor in made.items():
        part, _, rest = name.partition(".")
        assert torch.equal(tensor, given[f"{copied.get(part, part)}.{rest}"])
    assert not torch.equal(made["pixel_adapter.0.weight"], given["pixel_adapter.0.weight"])


@pytest.mark.parametrize(
    "copied", [{"edit_head": "gen_image_head"}, {"edit_image_head": "gen_input_adapter"}]
)
def test_a_part_that_cannot_be_copied_is_refused(copied):
    [(part, other)] = copied.items()
    with pytest.raises(InputError, match=f"copied has {part} = '{other}', but .* it has .*edit_image_head"):
        start_model(recipe(base=str(TINY), copied=copied))
