"""What LoRA learns from 200 pictures, and what it costs: `python -m tests.benchmarks.lora_word [STEPS]`.

The small model learns a word that it has never seen, `lavender`, for what it knows as purple, from drawn
scenes with captions. As many scenes without the word are repeated beside them. Scores are shares of held-out
scenes whose objects all have the right shape and colour.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from wallaroo.model.checkpoint import TINY, load, load_tokenizer
from wallaroo.model.engine import Engine, EngineOptions, Request
from wallaroo.model.prompts import generate_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.training.merge import merge
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import train
from wallaroo.workflows.scenes.captions import examples
from wallaroo.workflows.scenes.evaluate import score_picture
from wallaroo.workflows.scenes.world import Example
from wallaroo.workflows.scenes.write import to_line, to_values

WORD, KNOWN = "lavender", "purple"
PICTURES = 200
HELD_OUT = 100


def scenes(new: bool, count: int, held_out: bool) -> list[Example]:
    """English scenes, of those with a purple object the word for it replaced, or of those without one."""
    sizes = load(TINY, "generate").config.size_list()
    found = (
        example
        for example in examples(20 * count, 17, sizes, held_out, ("generate",))
        if example.language == "en" and (KNOWN in example.prompt) == new
    )
    return [
        dataclasses.replace(example, prompt=example.prompt.replace(KNOWN, WORD))
        for example, _ in zip(found, range(count), strict=False)
    ]


def drawn_right(folder: Path, asked: list[Example]) -> float:
    """Share of scenes that a checkpoint draws with the right objects."""
    model, tokenizer = load(folder, "generate"), load_tokenizer(folder)
    engine = Engine(model, "generate", EngineOptions(slots=32))

    def requests() -> Iterator[Request]:
        for key, example in enumerate(asked):
            size = model.config.bucket(example.scene.height, example.scene.width)
            prompt, null = (
                generate_prompt(tokenizer, model.config, text, size, "en") for text in (example.prompt, "")
            )
            yield Request(key, prompt, null, size, key, Sampling())

    right = 0
    for result in engine.run(list(requests())):
        example = asked[int(str(result.key))]
        assert result.pixels is not None
        right += score_picture(result.pixels, example.scene, example.named)["objects"]
    return right / len(asked)


def main(steps: int) -> None:
    learned, known = scenes(True, PICTURES, False), scenes(False, PICTURES, False)
    new, old = scenes(True, HELD_OUT, True), scenes(False, HELD_OUT, True)
    with tempfile.TemporaryDirectory() as made:
        lines = [to_line(to_values(one, str(number))) for number, one in enumerate(learned + known)]
        (Path(made) / "generate.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        values = {
            "part": "lm", "folder": f"{made}/out", "base": str(TINY), "steps": steps, "rate": 2e-3, "lora": 8,
            "data": {"generate": f"{made}/generate.parquet"}, "rows": {"generate": 16}, "warmup": 10,
            "decay": steps // 2, "smoothing": 0.01, "null_smoothing": 0.5, "largest_loss": 0,
        }  # fmt: skip
        start = time.monotonic()
        train(Recipe.from_dict(values))
        seconds = time.monotonic() - start
        merge(f"{made}/out", f"{made}/merged")
        print(f"{steps} steps of 16 rows on {PICTURES} new and {PICTURES} old images: {seconds:.0f} s")
        for name, asked in ((f"with '{WORD}'", new), ("without", old)):
            before, after = (drawn_right(folder, asked) for folder in (TINY, Path(made) / "merged"))
            print(f"{len(asked)} held-out prompts {name}: {before:.0%} right before, {after:.0%} after")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 150)
