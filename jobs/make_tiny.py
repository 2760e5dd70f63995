"""Makes the small checkpoint in `model/tiny` from nothing: `python -m wallaroo.jobs.make_tiny [FOLDER]`.

This file holds its configuration. Its merges are trained on the captions below and on the words of the drawn
scenes. Its weights are trained on the scenes, by the stages of `jobs/train/tiny.toml`, which takes hours.
Re-run to resume.
"""

import functools
import itertools
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch

from wallaroo.model.checkpoint import TINY, TOKENIZER, load, load_config, save
from wallaroo.model.config import DecoderConfig, ModelConfig, Size, VisionConfig, VQConfig
from wallaroo.model.prompts import SYSTEM, TEMPLATES
from wallaroo.model.tokenizer import QWEN_TOKENS, Tokenizer, add_control_tokens, added_tokens, build
from wallaroo.model.training.fresh import fresh_model
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import train
from wallaroo.workflows.scenes import captions as scenes_captions
from wallaroo.workflows.scenes import write

TEXT_TOKENS = 1000
"""Tokens of the vocabulary that stand for text: 256 bytes, the others merged."""

SIZES = {
    "0.5": (64, 128),
    "0.67": (64, 96),
    "0.75": (96, 128),
    "0.88": (112, 128),
    "1.0": (96, 96),
    "1.14": (128, 112),
    "1.33": (128, 96),
    "1.5": (96, 64),
    "2.0": (128, 64),
}
"""Height/width ratio -> (height, width) in pixels."""

RECIPES = Path(__file__).parent / "train" / "tiny.toml"

WORK = Path("out/tiny")
"""Where base, data and stages of a training are kept; RECIPES name it too."""

STAGES = ("vq", "stage-1", "stage-2", "stage-3-1", "stage-3-2", "stage-4-1", "stage-4-2", "stage-4-3")

DATA = (
    ("shapes-64", 24000, [(64, 64)], False),
    ("shapes-96", 8000, [(96, 96)], False),
    ("shapes", 24000, list(SIZES.values()), False),
    ("hard-64", 24000, [(64, 64)], True),
    ("hard", 40000, list(SIZES.values()), True),
)
"""Folder in WORK, rows a task, sizes, whether mostly the hard kinds."""

ENGLISH = {
    "count": "a|one|two|three|four|several|many|a pair of",
    "look": "small|large|round|shiny|old|wooden|striped|fluffy|bright|dark",
    "colour": "red|blue|green|yellow|purple|orange|black|white|brown|pink|grey",
    "thing": (
        "circle|square|triangle|star|ball|cube|apple|banana|cup|bottle|book|chair|table|clock|vase|bowl|cake|"
        "car|bicycle|train|boat|airplane|house|tree|flower|mountain|river|bridge|cat|dog|horse|bird|fish|sheep|"
        "elephant|bear|person|woman|man|child|robot|umbrella|suitcase"
    ),
    "place": (
        "on a table|in a garden|at the beach|in the snow|under a tree|by the river|in the city|on the grass|"
        "in front of a house|inside a room|in the forest|on a street at night"
    ),
    "relation": "to the left of|to the right of|above|below|next to|behind|in front of|on top of",
    "style": (
        "an oil painting|a photo|a watercolor|a pencil sketch|pixel art|a poster|a cartoon|a cinematic shot|"
        "digital art, highly detailed|black and white photography|soft morning light"
    ),
    "edit": (
        "turn the sky|change the background to|remove the|add a|replace the|make it look like|"
        "change the color of the|put a hat on the"
    ),
    "question": (
        "What is in this image?|Describe this image in detail.|How many objects are there?|What color is it?|"
        "Is there a person in the picture?|Where is it?"
    ),
}

CHINESE = {
    "count": "一个|两个|三只|四朵|一只|几辆|许多|一对",
    "look": "小小的|巨大的|圆形的|闪亮的|古老的|木制的|条纹的|毛茸茸的",
    "colour": "红色的|蓝色的|绿色的|黄色的|紫色的|橙色的|黑色的|白色的|粉色的",
    "thing": (
        "圆|正方形|三角形|星星|球|苹果|香蕉|杯子|瓶子|书|椅子|桌子|花瓶|蛋糕|汽车|自行车|火车|小船|飞机|房子|"
        "大树|花|雪山|小河|桥|猫|狗|马|鸟|鱼|大象|熊|女孩|男人|孩子|机器人|雨伞|灯笼"
    ),
    "place": "在桌子上|在花园里|在海边|在雪地里|在树下|在河边|在城市夜景中|在草地上|在森林里",
    "relation": "左边是|右边是|上面是|下面是|旁边是|后面是",
    "style": "油画风格|照片|水彩画|水墨画|铅笔素描|像素画|卡通风格|高清，细节丰富|柔和的晨光",
    "edit": "把背景换成|去掉图中的|添加|变成|把天空变成|给人物戴上",
    "question": "请详细描述这张图片。|图中有什么？|有多少个物体？|它是什么颜色的？|图中有人吗？",
}


WORKERS = 2
"""Processes that share each step: on two cores two, of a thread each, are quicker than one of two threads."""


def captions() -> list[str]:
    """The texts that the merges are learnt from: prompts of all tasks, in English and Chinese."""
    texts: list[str] = []
    sizes = itertools.cycle(SIZES.values())
    for language, words, space, comma in (("en", ENGLISH, " ", ", "), ("zh", CHINESE, "", "，")):
        lists = {name: items.split("|") for name, items in words.items()}

        def word(name: str, number: int, lists: dict[str, list[str]] = lists) -> str:
            # Strides of two primes, so that every word meets many others whatever the lists' lengths.
            items = lists[name]
            return items[(number * 31 + number // len(items) * 17) % len(items)]

        for number in range(600):
            first, second = (
                space.join(word(name, at) for name in ("count", "look", "colour", "thing"))
                for at in (number, number + 7)
            )
            requests = {
                "generate": [
                    first + space + word("place", number),
                    first + space + word("relation", number) + space + second + comma + word("style", number),
                ],
                "edit": [space.join(word(name, number) for name in ("edit", "colour", "thing"))],
            }
            for task, prompts in requests.items():
                for prompt in prompts:
                    height, width = next(sizes)
                    values = {"prompt": prompt, "target_w": width, "target_h": height}
                    texts.append(TEMPLATES[task, language].format(**values))
            texts.append(word("question", number))
            texts.append(f"system\n{SYSTEM}user\nassistant\n")
    return texts


def scene_words() -> list[str]:
    """The texts of the drawn scenes, the Chinese ones cut into words, so that no merge joins two."""
    sizes = [Size(*size) for size in SIZES.values()]
    between = ["的", "在", "背景", "上的", "把", "移到", "换成", "变成", "去掉", "和", "、", "加", "一个"]
    words = sorted({*scenes_captions.CHINESE.values(), *between}, key=len, reverse=True)
    cut = re.compile(f"({'|'.join(words)})")
    texts: list[str] = []
    for example in scenes_captions.examples(6000, 9, sizes, False):
        prompt = example.prompt
        if example.task != "understand":
            values = {"target_w": example.scene.width, "target_h": example.scene.height}
            prompt = TEMPLATES[example.task, example.language].format(prompt=prompt, **values)
        answer = example.answer
        if example.kind == "caption":
            # Prompts name two objects in either order, as these answers do not.
            answer = scenes_captions.caption(example.scene, example.language)
        for text in (prompt, answer):
            texts += filter(None, cut.split(text) if example.language == "zh" else [text])
    chinese = [word for items in CHINESE.values() for word in items.split("|")]
    return texts + [text for text in captions() if text.isascii()] + 3 * chinese


def tokenizer_json(controls: bool = True) -> str:
    """The vocabulary: bytes, merges, then the control tokens or only Qwen2.5's."""
    learner = build({}, [])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(scene_words(), trainer)
    add_control_tokens(learner, added_tokens(SIZES) if controls else QWEN_TOKENS)
    return learner.to_str(pretty=True)


def tiny_config(token_ids: dict[str, int]) -> ModelConfig:
    """The published architecture with small numbers.

    Rotary frequencies and image tokenizer suit short rows, and pictures of few colours.
    """
    return ModelConfig(
        name="tiny",
        layout="train",
        indicators="added",
        sizes=SIZES,
        decoder=DecoderConfig(
            vocab_size=64 * math.ceil((1 + max(token_ids.values())) / 64),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            mrope_section=(4, 6, 6),
            rope_theta=1000.0,
        ),
        vision=VisionConfig(
            depth=4,
            hidden_size=64,
            intermediate_size=160,
            num_heads=2,
            out_hidden_size=128,
            fullatt_block_indexes=(3,),
        ),
        vq=VQConfig(
            channels=8,
            channel_multipliers=(1, 2, 2, 4, 8),
            residual_blocks=1,
            norm_groups=4,
            z_channels=32,
            codebook_size=1024,
        ),
        edit_pixels=(3136, 12544),
        understand_pixels=(3136, 12544),
        trained_tokens={"generate": 512, "edit": 512, "understand": 512},
        token_ids=token_ids,
    )


def make_base(folder: str | Path, seed: int = 0) -> None:
    """Writes the checkpoint that training starts from.

    Args:
        folder: A new folder.
        seed: Of the random weights.
    """
    text = tokenizer_json()
    config = tiny_config(Tokenizer(text).token_ids)
    save(fresh_model(config, seed), config, text, folder)


def make(folder: str | Path) -> None:
    """Trains a checkpoint, or resumes its training, and writes it into a folder, over its files."""
    if not (WORK / "base").exists():
        make_base(WORK / "base")
    for name, rows, sizes, hard in DATA:
        if not (WORK / name / "held-out" / "understand.parquet").exists():
            print(f"drawing {WORK / name}", flush=True)
            drawn = [Size(*size) for size in sizes]
            write.write(str(WORK / name), rows, 600, 0, drawn, lines=True, hard=hard)
    for stage in STAGES:
        print(stage, flush=True)
        recipe = Recipe.from_file(RECIPES, stage)
        # The image tokenizer learns in one process.
        trained = train(recipe, functools.partial(print, flush=True), 1 if recipe.part == "vq" else WORKERS)
    text = (trained / TOKENIZER).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=WORK) as made:
        save(load(trained), load_config(trained), text, Path(made) / "tiny", dtype=torch.bfloat16)
        shutil.copytree(Path(made) / "tiny", folder, dirs_exist_ok=True)


def main() -> None:
    """Writes the checkpoint into the named folder, or to `model/tiny`."""
    if len(sys.argv) > 2:
        sys.exit("usage: python -m wallaroo.jobs.make_tiny [FOLDER]")
    make(sys.argv[1] if len(sys.argv) > 1 else TINY)


if __name__ == "__main__":
    main()
