"""The engine's CUDA path on a device without a GPU: devices of tensors, waits of the host, copies."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from wallaroo.model.config import DecoderConfig, ModelConfig, VisionConfig, VQConfig
from wallaroo.model.cuda.fake import FakeCuda, Waited
from wallaroo.model.cuda.fake_runtime import missing
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.random_inputs import random_model, text_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CONFIG = ModelConfig(
    decoder=DecoderConfig(300, 64, 128, 2, 4, 2, 1e-6, 1e4, (2, 3, 3)),
    vision=VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        fullatt_block_indexes=(1,),
    ),
    vq=VQConfig(channels=8, norm_groups=4, z_channels=16, codebook_size=128),
    sizes={"0.5": (32, 64), "1.0": (48, 48)},
    token_ids={"<|end_of_line>|": 280, "<|im_end|>": 281, "<|endoftext|>": 282},
)
OPTIONS = EngineOptions(
    slots=8, group_rows=4, prefill_piece=16, prefill_pieces=8, vq_slice=4, prompt_tokens=64, max_new_tokens=20
)


# -- the device itself --------------------------------------------------------------------------------


def test_copies_and_reads_that_the_host_waits_for_are_seen() -> None:
    with FakeCuda() as device, torch.inference_mode():
        there = torch.zeros(4, device="cuda")
        pinned = torch.zeros(4, pin_memory=True)
        assert there.device.type == "cuda"
        there.copy_(pinned, non_blocking=True)
        there[1] = 2  # fills, and copies nothing
        there[:2].add_(there[2:])
        there.to("cpu", non_blocking=True)
        assert not device.waits()
        for wait in (
            lambda: there.sum().item(),
            lambda: torch.zeros(4).to("cuda", non_blocking=True),  # not pinned
            lambda: there.copy_(pinned),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: there.cpu(),
            lambda: torch.nonzero(there),
            lambda: bool((there > 0).any()),
            lambda: torch.cuda.synchronize(),
        ):
            before = device.waits().total()
            wait()
            assert device.waits().total() == before + 1


def test_shapes_that_only_a_real_device_knows_are_an_error() -> None:
    with FakeCuda(), torch.inference_mode():
        there = torch.zeros(4, device="cuda")
        for read in (lambda: there[there > 0], lambda: there.repeat_interleave(there.long())):
            with pytest.raises(Waited, match="shape"):
                read()


def test_tensors_of_two_devices_do_not_mix() -> None:
    with FakeCuda(), torch.inference_mode(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(4, device="cuda") + torch.zeros(4)


def test_a_recording_takes_operators_and_refuses_what_waits() -> None:
    seen: list[str] = []
    with FakeCuda(lambda operator: seen.append(operator.name)) as device, torch.inference_mode():
        x = torch.zeros(4, 4, device="cuda")
        graph = torch.cuda.CUDAGraph()
        seen.clear()
        with torch.cuda.graph(graph):
            torch.relu_(x @ x)
        assert not seen, "what is recorded does not run"
        graph.replay()
        graph.replay()
        assert seen == ["aten::mm", "aten::relu_"] * 2
        for wait in (lambda: x.sum().item(), lambda: x.to("cpu"), lambda: torch.zeros(4).to("cuda")):
            with pytest.raises(Waited, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                wait()
        assert device.recording is None


# -- the engine on it ---------------------------------------------------------------------------------


def rows(task: str, count: int, seed: int = 0) -> list[Request]:
    """Rows of all sizes and filters, guided and not; null prompts are shared."""
    rng = np.random.default_rng(seed)
    sizes = CONFIG.size_list()
    nulls = {size: text_prompt(rng, 20, 270) for size in sizes}
    made = []
    for key in range(count):
        size = sizes[key % len(sizes)]
        sampling = Sampling(
            cfg=1.0 if task == "understand" else [1.0, 3.0][key % 2],
            temperature=1.0,
            top_k=[0, 20, 1000, 1][key % 4],
            top_p=[1.0, 0.9][key // 4 % 2],
        )
        semantic = pixels = None
        prompt, null = text_prompt(rng, int(rng.integers(5, 90)), 270), nulls[size]
        if task != "generate":
            semantic = rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)
            prompt = replace(text_prompt(rng, 60, 270), semantic=(40, 46))
        if task == "edit":
            height, width = size.grid
            pixel = np.arange(1, 1 + height * width, dtype=np.int32)
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            prompt = replace(prompt, pixel=pixel)
            null = replace(text_prompt(np.random.default_rng(1), 50, 270), semantic=(40, 46), pixel=pixel)
        shape = None if task == "understand" else size
        made.append(Request(key, prompt, null, shape, key, sampling, semantic, pixels, max_new_tokens=20))
    return made


def model_on(device: FakeCuda, task: str) -> Wallaroo:
    return random_model(CONFIG, (task,), torch.device("cuda"), torch.bfloat16)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of flash-attn two functions that have shapes only: the library itself needs a GPU."""
    if request.param != "flash":
        return str(request.param)
    # It looks for the library when it is imported, and would take this for a whole one.
    importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    module = ModuleType("flash_attn")

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, **_):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.stride(-1) == k.stride(-1) == 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert type(max_seqlen_q) is int and type(max_seqlen_k) is int
        return torch.empty_like(q)

    def with_kvcache(q, k_cache, v_cache, cache_seqlens=None, causal=False, num_splits=0, **_):
        assert q.dtype == k_cache.dtype == v_cache.dtype == torch.bfloat16
        assert q.stride(-1) == k_cache.stride(-1) == 1 and num_splits == 1
        assert cache_seqlens.dtype == torch.int32
        return torch.empty_like(q)

    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = varlen, with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return "flash"


BACKENDS = "sdpa", "flash", "triton"


CASES = [(task, (0.0, 1.0)) for task in ("generate", "edit", "understand")] + [("generate", (0.2, 0.6))]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("task", "interval"), CASES, ids=str)
def test_every_row_is_served_and_the_host_waits_for_nothing(
    task: str, backend: str, interval: tuple[float, float]
) -> None:
    requests = rows(task, 12)
    options = replace(OPTIONS, attention=backend, cfg_interval=interval)
    results: list[Result] = []
    with FakeCuda() as device:
        engine = Engine(model_on(device, task), task, options)
        device.clear()
        for request in requests:
            engine.submit(request)
        while engine.pending:
            results += engine.step()
        for phase in ("prefill", "admit", "decode", "results", "tokenizer"):
            waits = device.seen[phase].waits if phase in device.seen else {}
            # Recordings are made when nothing else runs. Stop flags of texts are read some steps late.
            allowed = {"a synchronisation"} if phase == "decode" else set()
            allowed |= {"an event"} if phase == "results" and task == "understand" else set()
            assert set(waits) <= allowed, f"{phase}: {dict(waits)}"
        replays = device.seen["decode"].replays
        recordings = sum(len(group.recorded) for group in engine.groups)
    assert replays > 0.8 * engine.counts["forwards"]
    assert recordings <= 2 * len(engine.groups)
    assert sorted(result.key for result in results) == list(range(len(requests)))
    for result in results:
        assert not result.error
        request = requests[int(str(result.key))]
        if request.size is not None:
            assert result.tokens.shape == (np.prod(request.size.grid),)
            assert result.pixels is not None and result.pixels.shape == (*request.size, 3)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_an_admission_is_one_copy_to_the_device(backend: str) -> None:
    with FakeCuda() as device:
        engine = Engine(
            model_on(device, "generate"), "generate", replace(OPTIONS, attention=backend, decode_vq=False)
        )
        for request in rows("generate", 20):
            engine.submit(request)
        admitting = 0
        while engine.pending:
            before = len(engine.waiting)
            device.clear()
            engine.step()
            copies = device.seen["admit"].to_device if "admit" in device.seen else 0
            groups = sum(group.active > 0 for group in engine.groups)
            assert copies <= max(groups, 1)
            forwards = device.seen["prefill"].to_device if "prefill" in device.seen else 0
            assert forwards <= engine.counts["prefill_forwards"]
            admitting += len(engine.waiting) < before
    assert admitting > 3, "rows came in while others decoded"
