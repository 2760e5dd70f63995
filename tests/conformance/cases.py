"""The published cases as requests, and the two ways of ours to serve them.

Of every case the conditional branch, the null branch and both together are served with the published
tokens forced, for their logits; then greedily without and with guidance.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tests.conformance.published import Family, metadata
from tests.numerics import logit_length, rounding
from wallaroo.model.config import Size
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.images import pixel_image, semantic_image
from wallaroo.model.prompts import Prompt
from wallaroo.model.reference import Reference
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

SERVERS = ("engine", "engine with the operators of CUDA", "plain loop")

PLAIN = Sampling(cfg=1.0, temperature=1.0, top_k=1, top_p=1.0)
GUIDED = Sampling(cfg=3.0, temperature=1.0, top_k=1, top_p=1.0)


def prompt_of(ids: np.ndarray, positions: np.ndarray) -> Prompt:
    """A prompt of the tiny model: ids `(L,)` in its vocabulary, positions `(3, L + generated)`."""
    length = len(ids)
    tokens = metadata("tiny_model")["token_ids"]
    following = positions[:, length:]
    next_position = int(positions[0, length])
    assert (following == next_position + np.arange(following.shape[1])).all(), "positions do not go on"
    semantic = pixel = None
    begin = np.flatnonzero(ids == tokens["<|vision_start|>"])
    if len(begin):
        semantic = (int(begin[0]) + 1, int(np.flatnonzero(ids == tokens["<|vision_end|>"])[0]))
        places = np.flatnonzero(ids[: begin[0]] == tokens["<|image_pad|>"]).astype(np.int32)
        pixel = places if len(places) else None
    return Prompt(ids, positions[:, :length], next_position, semantic, pixel)


def generate_requests(case: dict) -> list[Request]:
    """All requests of a text-to-image case; their keys are (case, what)."""
    arrays = Family("t2i", case["case"])
    prompt, null = (prompt_of(arrays[f"{x}ids"], arrays[f"{x}pos"]) for x in ("", "null_"))
    return _image_requests(case, arrays, prompt, null, None, None)


def edit_requests(case: dict) -> list[Request]:
    """All requests of an editing case; their keys are (case, what)."""
    arrays = Family("i2i", case["case"])
    prompt, null = (prompt_of(arrays[f"{x}ids"], arrays[f"{x}pos"]) for x in ("", "null_"))
    source, limits = Image.fromarray(arrays["src"]), metadata("i2i_meta")["seg"]
    semantic = semantic_image(source, limits["min_pixels"], limits["max_pixels"])
    return _image_requests(
        case, arrays, prompt, null, semantic, pixel_image(source, Size(case["H"], case["W"]))
    )


def _image_requests(
    case: dict,
    arrays: Family,
    prompt: Prompt,
    null: Prompt,
    semantic: np.ndarray | None,
    pixels: np.ndarray | None,
) -> list[Request]:
    black = [None if image is None else np.zeros_like(image) for image in (semantic, pixels)]
    branches = {
        "cond_logits": (prompt, None, PLAIN, semantic, pixels, True),
        "null_logits_correct": (null, None, PLAIN, *black, True),
        "cfg3_correct": (prompt, null, GUIDED, semantic, pixels, True),
        "greedy_cfg1": (prompt, None, PLAIN, semantic, pixels, False),
        "greedy_cfg3_correct": (prompt, null, GUIDED, semantic, pixels, False),
    }
    return [
        Request(
            (case["case"], what),
            conditional,
            nothing,
            Size(case["H"], case["W"]),
            seed=0,
            sampling=sampling,
            semantic=seen,
            pixels=kept,
            forced=arrays["tf_tokens"] if force else None,
        )
        for what, (conditional, nothing, sampling, seen, kept, force) in branches.items()
    ]


def understand_requests(case: dict, min_pixels: int, max_pixels: int) -> list[Request]:
    """All requests of an understanding case; their keys are (case, what)."""
    arrays = Family("mmu", case["case"])
    semantic = semantic_image(Image.fromarray(arrays["src"]), min_pixels, max_pixels)
    prompt = prompt_of(arrays["ids"], arrays["pos"])
    return [
        Request(
            (case["case"], what),
            prompt,
            None,
            None,
            seed=0,
            sampling=PLAIN,
            semantic=semantic,
            max_new_tokens=case["n_steps"],
            forced=forced,
        )
        for what, forced in (("tf_logits", arrays["tf_tokens"]), ("greedy", None))
    ]


def tolerances(model: Wallaroo, task: str, arrays: Family) -> tuple[float, float]:
    """What rounding explains of the logits of a case: of one branch, and of both together at `GUIDED`.

    Guided logits are cfg times one branch less cfg - 1 times the other, whose errors are independent.
    """
    expected = arrays["tf_logits" if task == "understand" else "cond_logits"]
    row = rounding(expected, logit_length(model, task))
    return row, math.hypot(GUIDED.cfg, GUIDED.cfg - 1) * row


def serve(server: str, model: Wallaroo, task: str, requests: Sequence[Request]) -> dict[tuple, Result]:
    """Key -> result with logits. The engine takes all requests at once; the plain loop texts one by one,
    and together the pictures that share size and sampling. On a CPU the operators of CUDA are plain torch."""
    if server.startswith("engine"):
        attention = None if server == "engine" else "triton"
        options = EngineOptions(slots=16, group_rows=4, decode_vq=False, trace=True, attention=attention)
        results = list(Engine(model, task, options).run(requests))
    elif task == "understand":
        plain = Reference(model)
        results = [plain.text(request, trace=True) for request in requests]
    else:
        plain = Reference(model)
        results = []
        for size, sampling in dict.fromkeys((request.size, request.sampling) for request in requests):
            same = [request for request in requests if (request.size, request.sampling) == (size, sampling)]
            results += plain.images(task, same, trace=True, decode_vq=False)
    assert all(not result.error for result in results), [result.error for result in results]
    return {result.key: result for result in results}
