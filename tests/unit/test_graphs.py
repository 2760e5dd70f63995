"""Decode steps that are recorded once and replayed; a tape of their operators stands for a CUDA graph."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wallaroo.model.config import DecoderConfig, ModelConfig, Size, VisionConfig, VQConfig
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.engine.updates import Updates
from wallaroo.model.prompts import Prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

CONFIG = ModelConfig(
    decoder=DecoderConfig(300, 64, 128, 2, 4, 2, 1e-6, 1e4, (2, 3, 3)),
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
LONGEST_PROMPT = 90


class Tape(TorchDispatchMode):
    """Notes operators with the tensors that they take and give, and makes them again.

    What comes fresh from an operator is put into the tensors that came when it was noted. A view is a view
    still, and is not noted. So nothing reaches a replay but by way of tensors that stay where they are, as in
    a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), (
            "the host reads a tensor"
        )
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        taken = {memory(x) for x in tensors((args, kwargs))}
        fresh = [(place, x) for place, x in enumerate(tensors(made)) if memory(x) not in taken]
        if fresh or func._schema.is_mutable:
            self.notes.append((func, args, kwargs, fresh))
        return made

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.notes:
            made = tensors(func(*args, **kwargs))
            for place, noted in fresh:
                noted.copy_(made[place])


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def memory(tensor: Tensor) -> int:
    """A number for the memory that a tensor lies in; weights that oneDNN has packed show none."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class Recording:
    """A function; its first call runs as it is, the second is noted, all others are replays."""

    def __init__(self, function: Callable[[], None], tapes: "Tapes"):
        self.function, self.tapes = function, tapes
        self.warm = False
        self.tape: Tape | None = None

    def __call__(self) -> None:
        if self.tape is not None:
            self.tapes.replays += 1
            self.tape.replay()
        elif self.warm:
            self.tape = Tape()
            self.tapes.recordings += 1
            with self.tape:
                self.function()
        else:
            self.warm = True
            self.function()


class Tapes:
    """A recorder; counts what is recorded, replayed and cleared."""

    def __init__(self) -> None:
        self.recordings = self.replays = self.clears = 0

    def __call__(self, function: Callable[[], None]) -> Recording:
        return Recording(function, self)

    def clear(self) -> None:
        self.clears += 1


@pytest.fixture(scope="module")
def model() -> Wallaroo:
    torch.set_num_threads(1)
    return random_model("generate")


def random_model(task: str) -> Wallaroo:
    """Weights large enough that drawn tokens depend on everything before them."""
    generator = torch.Generator().manual_seed(1)
    made = Wallaroo(CONFIG, (task,))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 / parameter[0].numel() ** 0.5, generator=generator)
    return made.requires_grad_(False)


def text_prompt(rng: np.random.Generator, length: int) -> Prompt:
    ids = rng.integers(0, 270, length).astype(np.int32)
    return Prompt(ids, np.tile(np.arange(length, dtype=np.int32), (3, 1)), length)


def requests(count: int, seed: int, longest: int = LONGEST_PROMPT) -> list[Request]:
    """Rows of all sizes, guided and not, with all filters."""
    rng = np.random.default_rng(seed)
    sizes = CONFIG.size_list()
    null = text_prompt(rng, 20)
    made = []
    for key in range(count):
        sampling = Sampling(
            cfg=float(rng.choice([1.0, 2.0, 4.0])),
            temperature=float(rng.choice([0.0, 0.8, 1.0])),
            # The first rows, with which steps are recorded, have no filter.
            top_k=int(rng.choice([0, 1, 20, 1000])) if key >= 20 else 0,
            top_p=float(rng.choice([0.9, 1.0, 1.0, 1.0])) if key >= 20 else 1.0,
        )
        prompt = text_prompt(rng, int(rng.integers(5, longest)))
        size = sizes[rng.integers(len(sizes))]
        made.append(Request(key, prompt, null, size, int(rng.integers(2**62)), sampling))
    return made


def serve(
    model: Wallaroo, rows: list[Request], tapes: list[Tapes] | None = None, **options: object
) -> dict[int, Result]:
    """Results by key; with a list, steps are recorded by tapes that are put into it."""

    def new_recorder() -> Tapes:
        assert tapes is not None
        tapes.append(Tapes())
        return tapes[-1]

    chosen = {"group_rows": 8, "slots": 16, "prompt_tokens": LONGEST_PROMPT} | options
    engine = Engine(model, model.tasks[0], EngineOptions(**chosen), None if tapes is None else new_recorder)
    return {result.key: result for result in engine.run(rows)}


def assert_same(ours: dict[int, Result], theirs: dict[int, Result]) -> None:
    assert set(ours) == set(theirs)
    for key, result in ours.items():
        assert not result.error
        assert np.array_equal(result.tokens, theirs[key].tokens), f"tokens of row {key} differ"
        assert np.array_equal(result.pixels, theirs[key].pixels), f"pixels of row {key} differ"


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_replayed_steps_make_the_pictures_of_steps_that_run(
    model: Wallaroo, attention: str, interval: tuple[float, float]
) -> None:
    """200 rows of mixed sizes and filters, whose slots are filled again and again."""
    rows = requests(200, seed=3)
    tapes: list[Tapes] = []
    chosen = {"attention": attention, "cfg_interval": interval}
    assert_same(serve(model, rows, tapes, **chosen), serve(model, rows, **chosen))
    assert all(one.recordings <= 2 for one in tapes)
    assert sum(one.replays for one in tapes) > 20 * sum(one.recordings for one in tapes) > 0


def test_texts_are_those_of_steps_that_run() -> None:
    model = random_model("understand")
    rows = [
        dataclasses.replace(row, null=None, size=None, sampling=dataclasses.replace(row.sampling, cfg=1.0))
        for row in requests(60, seed=4)
    ]
    rows = [dataclasses.replace(row, max_new_tokens=3 + row.key % 25) for row in rows]
    tapes: list[Tapes] = []
    recorded = serve(model, rows, tapes, attention="triton", max_new_tokens=30)
    assert_same(recorded, serve(model, rows, attention="triton"))
    assert all(one.recordings <= 2 for one in tapes)
    assert sum(one.replays for one in tapes) > 20
    assert {result.finish_reason for result in recorded.values()} == {"length", "stop"}


def test_a_row_that_is_longer_than_expected_makes_recordings_anew(model: Wallaroo) -> None:
    rows = [dataclasses.replace(row, sampling=Sampling(2.0)) for row in requests(60, seed=5)]
    rows[20] = dataclasses.replace(rows[20], size=Size(96, 96))
    rows[40] = dataclasses.replace(rows[40], prompt=text_prompt(np.random.default_rng(0), 600))
    tapes: list[Tapes] = []
    recorded = serve(model, rows, tapes, attention="triton", slots=8)
    assert_same(recorded, serve(model, rows, attention="triton", slots=8))
    assert [(one.clears, one.recordings) for one in tapes] == [(2, 3)]


def test_recorded_rows_are_the_same_in_any_company(model: Wallaroo) -> None:
    """Within one way of computing, whatever else is in the group and however long it may become."""
    rows = requests(40, seed=7)
    expected = serve(model, rows, [], attention="triton")
    order = np.random.default_rng(8).permutation(len(rows))
    shuffled = serve(model, [rows[index] for index in order], [], attention="triton", slots=32)
    assert_same(shuffled, expected)
    for row in rows[:5]:
        alone = serve(model, [row], [], attention="triton", prompt_tokens=500)
        assert_same(alone, {row.key: expected[row.key]})


def test_the_kernels_of_cuda_in_plain_torch_draw_what_the_plain_steps_draw(model: Wallaroo) -> None:
    """Two ways of computing round otherwise, so that a draw on the border may differ: hardly a row does."""
    rows = requests(60, seed=9)
    plain, fused = serve(model, rows), serve(model, rows, attention="triton")
    same = [np.array_equal(plain[row.key].tokens, fused[row.key].tokens) for row in rows]
    assert np.mean(same) > 0.9


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
@pytest.mark.parametrize("together", [False, True])
def test_changes_are_made_at_their_places_and_the_last_one_counts(dtype: torch.dtype, together: bool) -> None:
    columns, rows = torch.zeros(3, 5, dtype=dtype), torch.zeros(4, 6, dtype=dtype)
    updates = Updates(torch.device("cpu"), together)
    updates.put(columns, 1, 4, (9, 9, 9))
    updates.put(rows, 0, 2, np.arange(6))
    updates.put(columns, 1, 0, (1, 2, 3))
    updates.put(columns, 1, 4, (4, 5, 2**31))
    updates.send()
    updates.send()
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[:, 0] = torch.tensor([1, 2, 3])
    expected[:, 4] = torch.tensor([4, 5, 2**31])
    assert torch.equal(columns, expected.to(dtype))
    assert torch.equal(rows[2], torch.arange(6).to(dtype)) and not rows[[0, 1, 3]].any()
