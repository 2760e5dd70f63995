"""The engine's promises: a row is the same in any company, every row comes back once, shapes never change."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics import logit_length, rounding, sums
from wallaroo.model.config import DecoderConfig, ModelConfig, Size, VisionConfig, VQConfig
from wallaroo.model.counts import Operators, counted
from wallaroo.model.decoder import MLP, PACKS, PackedLinear, PackedMLP, packed
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions, even_threads, gpu_options, longest_prompt
from wallaroo.model.engine.pictures import Pictures
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.prompts import Prompt
from wallaroo.model.random_inputs import MODELS, text_requests
from wallaroo.model.random_inputs import random_model as bench_model
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

VOCABULARY = 300
CONFIG = ModelConfig(
    decoder=DecoderConfig(VOCABULARY, 64, 128, 2, 4, 2, 1e-6, 1e4, (2, 3, 3)),
    vision=VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        fullatt_block_indexes=(0,),
    ),
    vq=VQConfig(channels=8, norm_groups=4, z_channels=16, codebook_size=128),
    sizes={"0.5": (32, 64), "1.0": (48, 48), "1.33": (64, 48), "2.0": (64, 32)},
    token_ids={"<|end_of_line>|": 280, "<|im_end|>": 281, "<|endoftext|>": 282},
    tasks=("generate", "understand"),
)


def random_model(config: ModelConfig, task: str) -> Wallaroo:
    """Weights large enough that drawn tokens depend on everything before them."""
    generator = torch.Generator().manual_seed(1)
    model = Wallaroo(config, (task,))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, 1.5 / fan_in**0.5, generator=generator)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Wallaroo:
    torch.set_num_threads(1)
    return random_model(CONFIG, "generate")


def text_prompt(rng: np.random.Generator, length: int) -> Prompt:
    ids = rng.integers(0, 270, length).astype(np.int32)
    return Prompt(ids, np.tile(np.arange(length, dtype=np.int32), (3, 1)), length)


def random_requests(count: int, seed: int = 0) -> list[Request]:
    """Rows of all sizes, guided and not, with prompts of one to five chunks and shared null prompts."""
    rng = np.random.default_rng(seed)
    sizes = CONFIG.size_list()
    nulls = {size: text_prompt(rng, 20) for size in sizes}
    prompts = [text_prompt(rng, int(rng.integers(5, 150))) for _ in range(count // 2 + 1)]
    requests = []
    for key in range(count):
        size = sizes[rng.integers(len(sizes))]
        sampling = Sampling(
            cfg=float(rng.choice([1.0, 2.0, 4.0])),
            temperature=1.0,
            top_k=int(rng.choice([0, 20, 1000])),
            top_p=float(rng.choice([0.9, 1.0])),
        )
        prompt = prompts[rng.integers(len(prompts))]
        requests.append(Request(key, prompt, nulls[size], size, int(rng.integers(2**62)), sampling))
    return requests


def serve(model: Wallaroo, requests: Iterable[Request], **options: object) -> dict[int, Result]:
    engine = Engine(model, model.tasks[0], EngineOptions(**{"group_rows": 8, "slots": 16} | options))
    results = list(engine.run(requests))
    assert engine.pending == 0
    by_key = {result.key: result for result in results}
    assert len(by_key) == len(results), "a row came back twice"
    return by_key


def assert_same(ours: dict[int, Result], theirs: dict[int, Result]) -> None:
    for key, result in ours.items():
        assert np.array_equal(result.tokens, theirs[key].tokens), f"tokens of row {key} differ"
        assert np.array_equal(result.pixels, theirs[key].pixels), f"pixels of row {key} differ"


REQUESTS = random_requests(120)


@pytest.fixture(scope="module")
def expected(model: Wallaroo) -> dict[int, Result]:
    results = serve(model, REQUESTS)
    assert set(results) == set(range(len(REQUESTS)))
    # Narrow filters may lead two rows of one prompt to the same small picture, on one machine or another.
    assert len({result.tokens.tobytes() for result in results.values()}) > 0.9 * len(REQUESTS)
    return results


@pytest.mark.numerics
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 8},
        {"slots": 40},
        {"prefix_sharing": False},
        {"prefix_tokens": 0},
    ],
    ids=str,
)
def test_a_row_is_the_same_with_any_number_of_groups_and_any_sharing(
    model: Wallaroo, expected: dict[int, Result], options: dict[str, object]
) -> None:
    assert_same(serve(model, REQUESTS, **options), expected)


@pytest.mark.numerics
def test_a_row_is_the_same_in_any_order_and_slot(model: Wallaroo, expected: dict[int, Result]) -> None:
    order = np.random.default_rng(3).permutation(len(REQUESTS))
    assert_same(serve(model, [REQUESTS[index] for index in order]), expected)
    assert_same(serve(model, REQUESTS[::-1], slots=8), expected)


@pytest.mark.numerics
def test_a_row_is_the_same_alone(model: Wallaroo, expected: dict[int, Result]) -> None:
    for request in REQUESTS[:10]:
        assert_same(serve(model, [request]), expected)


def test_a_row_is_the_same_when_rows_arrive_while_others_decode(
    model: Wallaroo, expected: dict[int, Result]
) -> None:
    engine = Engine(model, "generate", EngineOptions(slots=8, group_rows=8))
    waiting, results = list(REQUESTS[:50]), {}
    while waiting or engine.pending:
        for _ in range(min(len(waiting), 1 + len(results) % 3)):
            engine.submit(waiting.pop())
        results |= {result.key: result for result in engine.step()}
    assert len(results) == 50
    assert_same(results, expected)


@pytest.mark.numerics
def test_a_wide_row_has_the_same_bits_in_any_slot_with_threads_that_share_evenly() -> None:
    """Six threads would share the numbers of the MLP within vectors, which round otherwise at their ends."""
    decoder = dataclasses.replace(CONFIG.decoder, intermediate_size=18944)
    threads = even_threads(decoder, EngineOptions(), 6)
    assert threads == 4
    torch.manual_seed(0)
    mlp, x = MLP(decoder).requires_grad_(False), torch.randn(32, decoder.hidden_size)
    try:
        torch.set_num_threads(threads)
        expected = mlp(x, x)
        for turned in range(1, 32):
            other = x.roll(turned, 0)
            assert torch.equal(mlp(other, other).roll(-turned, 0), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.numerics
@pytest.mark.skipif(not PACKS, reason="this torch has no oneDNN")
@pytest.mark.parametrize("threads", [2, 3])
def test_a_row_has_the_same_bits_in_any_place_of_a_packed_product(threads: int) -> None:
    decoder = dataclasses.replace(CONFIG.decoder, hidden_size=512, intermediate_size=1000)
    torch.manual_seed(0)
    mlp, x = packed(MLP(decoder).requires_grad_(False), 32), torch.randn(32, 512)
    assert isinstance(mlp, PackedMLP)
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            expected = mlp(x, x)
            for turned in range(1, 32):
                other = x.roll(turned, 0)
                assert torch.equal(mlp(other, other).roll(-turned, 0), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("wanted", [1, 2, 3, 6, 16])
def test_narrow_models_take_all_threads(wanted: int) -> None:
    assert even_threads(CONFIG.decoder, EngineOptions(), wanted) == wanted


@pytest.mark.numerics
def test_a_picture_is_the_same_wherever_it_stands_in_a_vq_slice(model: Wallaroo) -> None:
    few, many = serve(model, REQUESTS[:3], vq_slice=4), serve(model, REQUESTS[:20], vq_slice=4)
    assert_same(few, many)


def test_a_picture_of_a_rare_size_does_not_wait_for_the_end(
    model: Wallaroo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pictures, "PATIENCE", 12)
    usual = [dataclasses.replace(row, size=Size(48, 48), sampling=Sampling(2.0)) for row in REQUESTS[:60]]
    rare = dataclasses.replace(usual[0], key="rare", size=Size(32, 64))
    engine = Engine(model, "generate", EngineOptions(slots=8, group_rows=8, vq_slice=4))
    results = {result.key: result for result in engine.run([rare, *usual])}
    assert list(results).index("rare") < 30
    assert_same(serve(model, [rare], vq_slice=4), results)


class ShapeRecorder(TorchDispatchMode):
    """Notes every operator with the shapes of all tensors it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[tuple[int, ...], ...]]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        self.seen.add((str(func), tuple(tuple(x.shape) for x in flat if isinstance(x, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def test_shapes_stay_the_same_while_rows_come_and_go(model: Wallaroo) -> None:
    """Every operator's shapes, in every order and company of the rows, are those of the first pass."""
    engine = Engine(model, "generate", EngineOptions(slots=16, group_rows=8))
    guided = [dataclasses.replace(r, sampling=Sampling(3.0, 1.0, 50, 1.0)) for r in REQUESTS[:60]]
    list(engine.run(guided))  # buffers have grown to the longest row
    with ShapeRecorder() as first:
        list(engine.run(guided))
    assert len(first.seen) > 50
    with ShapeRecorder() as second:
        waiting = guided[::-1]
        while waiting or engine.pending:
            for _ in range(min(len(waiting), 1 + len(waiting) % 4)):
                engine.submit(waiting.pop(len(waiting) // 2))
            engine.step()
    assert second.seen - first.seen == set()
    arithmetic = (
        "aten.mm",
        "aten.bmm",
        "aten.addmm",
        "aten.sort",
        "aten.convolution",
        "aten.native_group_norm",
    )
    ours, theirs = ({x for x in r.seen if x[0].startswith(arithmetic)} for r in (first, second))
    assert ours == theirs


def test_shared_prompts_are_prefilled_once(model: Wallaroo) -> None:
    request = REQUESTS[0]
    rows = [dataclasses.replace(request, key=key, seed=key, sampling=Sampling(2.0)) for key in range(8)]
    engine = Engine(model, "generate", EngineOptions(slots=8, group_rows=8))
    results = list(engine.run(rows))
    assert engine.counts["prefill_tokens"] == len(request.prompt.ids) + len(rows[0].null.ids)
    assert engine.counts["prefixes_shared"] == 14
    assert len({result.tokens.tobytes() for result in results}) == 8


def test_tokens_and_pixels_have_the_shape_of_the_size(model: Wallaroo, expected: dict[int, Result]) -> None:
    for request in REQUESTS:
        result = expected[request.key]
        assert result.tokens.dtype == np.int32
        assert result.tokens.shape == (request.size.height * request.size.width // 256,)
        assert result.tokens.min() >= 0 and result.tokens.max() < CONFIG.vq.codebook_size
        assert result.pixels.shape == (*request.size, 3)
        assert result.pixels.dtype == np.uint8
        assert (result.finish_reason, result.error) == ("length", "")
        assert result.prompt_tokens == len(request.prompt.ids)


def test_a_bad_row_comes_back_with_its_error_and_harms_no_other(
    model: Wallaroo, expected: dict[int, Result]
) -> None:
    bad = dataclasses.replace(REQUESTS[0], key="bad", sampling=Sampling(cfg=float("nan")))
    lonely = dataclasses.replace(REQUESTS[0], key="lonely", null=None, sampling=Sampling(cfg=2.0))
    results = serve(model, [bad, *REQUESTS[:5], lonely])
    assert "cfg is nan" in results.pop("bad").error
    assert "null prompt" in results.pop("lonely").error
    assert_same(results, expected)


@pytest.mark.numerics
def test_forced_tokens_are_taken_and_scored(model: Wallaroo) -> None:
    size = Size(32, 64)
    forced = np.arange(8, dtype=np.int32)
    request = dataclasses.replace(REQUESTS[0], size=size, forced=forced, sampling=Sampling(2.0))
    result = serve(model, [request], trace=True)[request.key]
    assert np.array_equal(result.tokens, forced)
    assert result.logits.shape == (8, CONFIG.vq.codebook_size)
    again = dataclasses.replace(request, forced=np.array([0, 1, 2, 3, -1, -1, -1, -1], np.int32))
    partly = serve(model, [again], trace=True)[request.key]
    assert np.array_equal(partly.logits[:5], result.logits[:5])
    assert np.array_equal(partly.tokens[:4], forced[:4])


def test_without_line_ends_there_is_a_step_a_token() -> None:
    square = dataclasses.replace(CONFIG, line_break=False)
    engine = Engine(random_model(square, "generate"), "generate", EngineOptions(slots=8, group_rows=8))
    result = next(engine.run([dataclasses.replace(REQUESTS[0], size=Size(48, 48))]))
    assert result.tokens.shape == (9,)
    assert engine.counts["forwards"] == 9 - 1  # nothing is computed from a last token


def test_with_line_ends_there_is_a_step_more_a_line(model: Wallaroo) -> None:
    engine = Engine(model, "generate", EngineOptions(slots=8, group_rows=8))
    next(engine.run([dataclasses.replace(REQUESTS[0], size=Size(48, 48))]))
    assert engine.counts["forwards"] == 9 + 2 - 1


def test_texts_end_at_a_stop_token_or_at_their_bound() -> None:
    model = random_model(CONFIG, "understand")
    rng = np.random.default_rng(5)
    stop = CONFIG.token_ids["<|im_end|>"]
    forced = np.full(20, 7, np.int32)
    forced[6] = stop
    greedy = Sampling(cfg=1.0, top_k=1)
    rows = [
        Request("stops", text_prompt(rng, 30), None, None, 0, greedy, max_new_tokens=20, forced=forced),
        Request("goes on", text_prompt(rng, 50), None, None, 0, greedy, max_new_tokens=11),
        Request("one", text_prompt(rng, 9), None, None, 0, greedy, max_new_tokens=1),
    ]
    engine = Engine(model, "understand", EngineOptions(slots=8, group_rows=8, trace=True))
    results = {result.key: result for result in engine.run(rows)}
    assert results["stops"].tokens.tolist() == [7] * 6
    assert results["stops"].finish_reason == "stop"
    longer = results["goes on"]
    if longer.finish_reason == "length":
        assert longer.tokens.shape == (11,)
    assert len(results["one"].tokens) <= 1
    # The row that stopped left its slot within the few steps between two looks at the flags.
    assert engine.counts["row_steps"] <= 6 + 1 + engine.groups[0].STOP_CHECK + 11 + 1


def test_a_thousand_random_rows_are_the_same_in_two_engines(model: Wallaroo) -> None:
    """Every row meets other neighbours, slots, groups and prefills, and may be the first of its prompt."""
    requests = random_requests(1000, seed=11)
    one = serve(model, requests, slots=16)
    order = np.random.default_rng(12).permutation(len(requests))
    other = serve(model, [requests[index] for index in order], slots=40, prefix_sharing=False)
    assert set(one) == set(other) == set(range(1000))
    assert_same(one, other)


class Exhausted(TorchDispatchMode):
    """A device whose memory runs out at certain operators, counted from the first."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at, self.number = set(at), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += 1
        if self.number in self.at:
            raise torch.OutOfMemoryError("tried to allocate too much\nand more words")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", range(6))
def test_where_memory_runs_out_fewer_groups_make_the_same_pictures(
    model: Wallaroo, expected: dict[int, Result], seed: int
) -> None:
    requests = REQUESTS[:30]
    engine = Engine(model, "generate", EngineOptions(slots=16, group_rows=4))
    with Exhausted() as counted:
        list(engine.run(requests))
    at = np.random.default_rng(seed).integers(1, counted.number, 2)
    engine = Engine(model, "generate", EngineOptions(slots=16, group_rows=4))
    with Exhausted(*at.tolist()), pytest.warns(RuntimeWarning, match="out of memory with"):
        results = list(engine.run(requests))
    assert engine.slots == (4 if len(set(at)) == 2 else 8)
    assert engine.pending == 0
    assert sorted(result.key for result in results) == list(range(30))
    eight = serve(model, requests, slots=16, group_rows=4)
    assert_same({result.key: result for result in results}, eight)


def test_with_one_group_left_lack_of_memory_is_an_error(model: Wallaroo) -> None:
    engine = Engine(model, "generate", EngineOptions(slots=4, group_rows=4))
    with Exhausted(50), pytest.raises(torch.OutOfMemoryError):
        list(engine.run(REQUESTS[:2]))


def test_a_single_group_without_memory_becomes_a_smaller_one_where_options_name_any(
    model: Wallaroo, expected: dict[int, Result]
) -> None:
    """The environment's shapes tell it; rows are those of an engine that began with the smaller group."""
    requests = REQUESTS[:30]
    options = EngineOptions(slots=8, group_rows=8, smaller=(4,))
    engine = Engine(model, "generate", options)
    with Exhausted(500), pytest.warns(RuntimeWarning, match="a group has 4 rows now"):
        results = list(engine.run(requests))
    assert (engine.slots, engine.options.smaller) == (4, ())
    assert engine.shapes() == EngineOptions(group_rows=4).shapes(torch.device("cpu"), torch.float32)
    assert_same({result.key: result for result in results}, serve(model, requests, slots=4, group_rows=4))
    with Exhausted(50), pytest.raises(torch.OutOfMemoryError):
        list(engine.run(requests))  # there is nothing left to give up


@pytest.mark.parametrize(
    "sampling, interval",
    [
        (Sampling(3.0, 1.0, 20, 1.0), (0.0, 1.0)),
        (Sampling(1.0, 1.0, 0, 0.9), (0.0, 1.0)),
        (Sampling(3.0, 1.0, 20, 1.0), (0.3, 0.6)),
    ],
    ids=str,
)
def test_a_warm_step_waits_for_nothing_and_makes_no_buffers(
    model: Wallaroo, sampling: Sampling, interval: tuple[float, float]
) -> None:
    rows = [dataclasses.replace(row, size=Size(64, 48), sampling=sampling) for row in REQUESTS[:8]]
    engine = Engine(model, "generate", EngineOptions(slots=8, group_rows=8, cfg_interval=interval))
    for row in rows:
        engine.submit(row)
    for _ in range(2):
        engine.step()
    with Operators() as seen:
        for _ in range(12 + 3 - 1 - 3):  # up to the step before the last
            assert engine.step() == []
    assert seen.counts["operators"] > 500
    assert (seen.counts["synchronisations"], seen.counts["buffers"]) == (0, 0)


def test_operators_that_wait_or_make_buffers_are_seen() -> None:
    numbers = torch.arange(4)
    for waits in (lambda: numbers.max().item(), lambda: numbers[numbers > 1], lambda: numbers.nonzero()):
        with Operators() as seen:
            waits()
        assert seen.counts["synchronisations"] == 1
    for makes in (lambda: torch.zeros(3), lambda: numbers.new_empty(2), lambda: torch.empty_like(numbers)):
        with Operators() as seen:
            makes()
        assert seen.counts["buffers"] >= 1


def test_rows_with_seeds_of_their_own_cost_no_operator_more(model: Wallaroo) -> None:
    rows = [dataclasses.replace(row, size=Size(48, 48), sampling=Sampling(2.0)) for row in REQUESTS[:16]]
    counts = []
    for seeds in (range(16), [0] * 16):
        engine = Engine(model, "generate", EngineOptions(slots=16, group_rows=8))
        with Operators() as seen:
            list(engine.run(dataclasses.replace(r, seed=s) for r, s in zip(rows, seeds, strict=True)))
        counts.append(seen.counts)
    assert counts[0] == counts[1]


def test_the_slots_stay_full_until_the_last_refill(model: Wallaroo) -> None:
    """Counted from the rows that the groups hold at each step, 200 rows of mixed sizes."""
    engine = Engine(model, "generate", EngineOptions(slots=16, group_rows=8, decode_vq=False))
    for request in random_requests(200, seed=4):
        engine.submit(dataclasses.replace(request, sampling=Sampling(3.0)))
    used = steps = 0
    while engine.waiting:
        engine.step()
        used += sum(group.active_before for group in engine.groups)
        steps += 1
    assert steps > 60
    assert used / (16 * steps) >= 0.95


def test_a_gpu_gets_as_many_slots_as_fit_in_groups_whose_shape_slots_do_not_change() -> None:
    large = ModelConfig(name="7b")
    chosen = [gpu_options(large, gigabytes << 30, 2) for gigabytes in (4, 8, 30, 120)]
    assert [(options.group_rows, options.slots) for options in chosen] == [
        (4, 4),
        (16, 16),
        (64, 64),
        (128, 128),
    ]
    assert [options.smaller for options in chosen] == [(), (4,), (16, 4), (64, 16, 4)]
    assert gpu_options(large, 120 << 30, 2, slots=16).group_rows == 128
    assert gpu_options(large, 120 << 30, 2, slots=16).slots == 16
    given = gpu_options(large, 120 << 30, 2, group_rows=32, vq_slice=8)
    assert (given.group_rows, given.slots, given.smaller, given.vq_slice) == (32, 128, (16, 4), 8)


def test_edit_prompts_count_when_a_group_is_chosen_for_a_gpu() -> None:
    """They hold a picture too: 64 of them do not fit where 64 of text alone do."""
    large = ModelConfig(name="7b")
    assert gpu_options(large, 30 << 30, 2, task="generate").group_rows == 64
    assert gpu_options(large, 30 << 30, 2, task="edit").group_rows == 16
    longer = gpu_options(large, 30 << 30, 2, task="generate", prompt_tokens=4096)
    assert longer.group_rows == 16


def test_pictures_to_be_understood_count_at_the_limits_of_the_run() -> None:
    large = ModelConfig(name="7b")
    own, wide = EngineOptions(), EngineOptions(pixels=(1003520, 12845056))
    assert longest_prompt(large, "understand", own) == 1024 + 128 + 240
    assert longest_prompt(large, "understand", wide) == 1024 + 128 + 16384
    assert longest_prompt(large, "generate", wide) == longest_prompt(large, "generate", own) == 1024 + 128
    assert longest_prompt(large, "edit", wide) == 1024 + 128 + 240 + 32 * 32 + 31
    found = [
        gpu_options(large, gigabytes << 30, 2, task="understand", pixels=wide.pixels, max_new_tokens=2048)
        for gigabytes in (120, 60, 30)
    ]
    assert [(one.group_rows, one.smaller) for one in found] == [(16, (4,)), (16, (4,)), (4, ())]
    assert gpu_options(large, 120 << 30, 2, task="understand").group_rows == 128


HALF = (0.0, 0.5)


@pytest.fixture(scope="module")
def half_guided(model: Wallaroo) -> dict[int, Result]:
    return serve(model, REQUESTS[:60], cfg_interval=HALF)


def test_rows_guided_in_all_steps_are_those_of_an_engine_that_knows_no_interval(
    model: Wallaroo, expected: dict[int, Result], half_guided: dict[int, Result]
) -> None:
    assert_same(serve(model, REQUESTS[:30], cfg_interval=(0.0, 1.0)), expected)
    guided = [request.key for request in REQUESTS[:60] if request.sampling.guided]
    differing = sum(not np.array_equal(expected[key].tokens, half_guided[key].tokens) for key in guided)
    assert differing > len(guided) / 2


@pytest.mark.numerics
def test_a_row_guided_in_a_part_of_its_steps_is_the_same_in_any_company(
    model: Wallaroo, half_guided: dict[int, Result]
) -> None:
    shuffled = [REQUESTS[index] for index in np.random.default_rng(3).permutation(60)]
    assert_same(serve(model, shuffled, cfg_interval=HALF, slots=40), half_guided)
    few = serve(model, REQUESTS[:60], cfg_interval=HALF, slots=8, prefix_sharing=False)
    assert_same(few, half_guided)
    for request in REQUESTS[:5]:
        assert_same(serve(model, [request], cfg_interval=HALF), half_guided)


def test_null_branches_that_end_early_make_room_for_other_rows(model: Wallaroo) -> None:
    """Fewer forwards of the same shapes, and null branches fed only up to the last guided step."""
    rows = [dataclasses.replace(row, size=Size(64, 48), sampling=Sampling(3.0)) for row in REQUESTS[:112]]
    steps = 12 + 3
    counts, shapes = {}, {}
    for interval in ((0.0, 1.0), HALF, (0.5, 1.0)):
        options = EngineOptions(slots=8, group_rows=8, decode_vq=False, cfg_interval=interval)
        engine = Engine(model, "generate", options)
        results = engine.run(rows)
        with ShapeRecorder() as recorder:
            for _ in range(16):
                next(results)
        shapes[interval] = {shape for shape in recorder.seen if shape[0].startswith("aten.addmm")}
        assert len(list(results)) == len(rows) - 16
        counts[interval] = engine.counts
        assert engine.counts["row_steps"] == len(rows) * steps
    always, half, late = counts.values()
    assert always["null_steps"] == late["null_steps"] == len(rows) * (steps - 1)
    assert half["null_steps"] == len(rows) * round(steps / 2)
    # Three quarters in the long run of large pictures; the last rows leave places empty.
    assert half["forwards"] < 0.9 * always["forwards"]
    assert shapes[0.0, 1.0] == shapes[HALF]


def test_no_null_branch_is_prefilled_where_no_step_is_guided(model: Wallaroo) -> None:
    request = dataclasses.replace(REQUESTS[0], size=Size(48, 48), sampling=Sampling(3.0))
    engine = Engine(model, "generate", EngineOptions(slots=8, group_rows=8, cfg_interval=(0.0, 0.01)))
    list(engine.run([request]))
    assert engine.counts["prefill_tokens"] == len(request.prompt.ids)
    assert engine.counts["null_steps"] == 0


@pytest.mark.numerics
def test_logits_are_guided_within_the_interval_and_not_outside(model: Wallaroo) -> None:
    """The same tokens forced, so that all that differs is guidance."""
    forced = np.random.default_rng(6).integers(0, CONFIG.vq.codebook_size, 12).astype(np.int32)
    row = dataclasses.replace(REQUESTS[0], size=Size(64, 48), forced=forced)
    others = [dataclasses.replace(other, size=Size(48, 48)) for other in REQUESTS[1:20]]

    def logits(cfg: float, interval: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
        asked = dataclasses.replace(row, sampling=Sampling(cfg))
        return serve(model, [*others, asked], trace=True, cfg_interval=interval)[row.key].logits

    guided, plain = logits(3.0), logits(1.0)
    assert np.abs(guided - plain).max(axis=1).min() > 0.1  # far more than what rounding explains
    # Steps 3 to 8 of 15 are guided; of these the line ends at 3 and 7 are not drawn.
    some = logits(3.0, (0.2, 0.6))
    inside = slice(3, 3 + 4)
    # Null branches that end early leave other rows other places, and so other shapes.
    allowed = math.hypot(3, 2) * rounding(plain, logit_length(model, "generate"))
    np.testing.assert_allclose(some[inside], guided[inside], rtol=0, atol=allowed)
    outside = np.r_[0:3, 7:12]
    np.testing.assert_allclose(some[outside], plain[outside], rtol=0, atol=allowed)


def test_a_full_batch_takes_little_more_than_the_least_arithmetic() -> None:
    config = MODELS["mid"]
    options = EngineOptions(slots=32, group_rows=32, decode_vq=False)
    requests = text_requests(config, 32, [Size(128, 128)])
    model = bench_model(config, ("generate",), torch.device("cpu"), torch.float32)
    counts = counted(model, requests, options)
    assert 1 <= counts["flops_ratio"] <= 1.02
    assert counts["padded_row_share"] == 0
    assert counts["synchronisations_per_step"] == counts["allocations_per_step"] == 0
    assert counts["forwards_per_image"] == 8 * 9 - 2  # the first token is the prompt's, the last is not fed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_steps_draw_the_same_tokens_as_steps_that_run() -> None:
    random = random_model(CONFIG, "generate").to("cuda")
    replayed, run = (serve(random, REQUESTS, graphs=graphs) for graphs in (True, False))
    assert_same(replayed, run)


@pytest.mark.numerics
@pytest.mark.skipif(not PACKS, reason="this torch has no oneDNN")
def test_packed_weights_give_the_products_of_those_they_are_made_of() -> None:
    decoder = random_model(CONFIG, "generate").language_model
    made = packed(decoder, 32)
    torch.manual_seed(2)

    def parts(whole: torch.nn.Module, *kinds: type) -> list[torch.nn.Module]:
        return [module for module in whole.modules() if isinstance(module, kinds)]

    kinds = PackedLinear, PackedMLP
    assert not parts(decoder, *kinds)
    assert len(parts(made, PackedMLP)) == len(decoder.layers) and not parts(made, MLP, torch.nn.Linear)
    assert len(parts(made, PackedLinear)) == 3 * len(decoder.layers)
    with torch.inference_mode():
        for one, other in zip(made.layers, decoder.layers, strict=True):
            attention, plain = one.self_attn, other.self_attn
            for product, linear in (
                (attention.qkv_proj, plain.qkv_proj),
                (attention.o_proj, plain.o_proj),
                (one.mlp.down_proj, other.mlp.down_proj),
            ):
                x, residual = torch.randn(32, linear.in_features), torch.randn(32, linear.out_features)
                wanted = linear(x)
                allowed = rounding(wanted, linear.in_features)
                torch.testing.assert_close(product(x), wanted, rtol=0, atol=allowed)
                torch.testing.assert_close(product(x, residual), residual + wanted, rtol=0, atol=allowed)
            x, residual = torch.randn(2, 32, CONFIG.decoder.hidden_size)
            wanted = other.mlp(residual, x)
            allowed = rounding(wanted, sums(other.mlp))
            torch.testing.assert_close(one.mlp(residual, x), wanted, rtol=0, atol=allowed)
    # Nothing is packed that is multiplied in another way.
    half = random_model(CONFIG, "generate").bfloat16().language_model
    assert not parts(packed(half, 32), *kinds)
