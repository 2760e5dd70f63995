"""Scenes in words, in English and Chinese: captions, instructions, questions and answers."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from wallaroo.model.config import LANGUAGES, Size
from wallaroo.model.prompts import DEFAULT_QUESTION
from wallaroo.workflows.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    HARD,
    KINDS,
    OPPOSITE,
    SHAPES,
    SPANS,
    Example,
    Scene,
    Thing,
    choice,
    free_room,
    held_out,
    in_order,
    random_scene,
)

CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "white": "白色", "black": "黑色", "grey": "灰色", "pink": "粉色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字形",
    "small": "小", "large": "大",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面", "top": "上方", "bottom": "下方",
    "yes": "是", "no": "否", "one": "一个", "two": "两个", "three": "三个",
}  # fmt: skip
_BETWEEN = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_NUMBERS = ("one", "two", "three")
_SIDES = ("left", "right", "top", "bottom")


def sample(generator: np.random.Generator, size: Size, task: str, kind: str, language: str) -> Example:
    """Draws a random row of one kind, which may be a held-out combination or not.

    Args:
        generator: Of random numbers.
        size: Of the picture, in pixels.
        task: `generate`, `edit` or `understand`.
        kind: One of the kinds of the task.
        language: `en` or `zh`.

    Returns:
        The row.
    """
    return _SAMPLERS[task](generator, size, kind, language)


def examples(
    rows: int,
    seed: int,
    sizes: list[Size],
    held: bool,
    tasks: tuple[str, ...] = tuple(KINDS),
    first: int = 0,
    hard: bool = False,
) -> Iterator[Example]:
    """Draws rows of all tasks, kinds, languages and sizes in turn.

    Row n depends on n and the arguments alone.

    Args:
        rows: Number after the last row.
        seed: Of the random numbers.
        sizes: Of the pictures, in pixels.
        held: Draw only held-out combinations (of an edit, its result), or only the others. In training both
            the source and the result of an edit are of the others.
        tasks: The tasks of the rows.
        first: Number of the first row.
        hard: Draw the kinds in HARD three times as often as others; two of three such edits are of one object
            of two.

    Yields:
        The rows, in order.
    """
    cells = [
        (task, kind, more)
        for task in tasks
        for kinds, more in ((KINDS[task], False), (2 * HARD[task] if hard else (), True))
        for kind in kinds
    ]
    for number in range(first, rows):
        generator = np.random.default_rng((seed, int(held), number))
        task, kind, of_two = cells[number % len(cells)]
        turn = number // len(cells)
        language, size = LANGUAGES[turn % 2], sizes[turn // 2 % len(sizes)]
        if kind == "three" and free_room(size) < 3:
            kind = "pair"
        while True:
            example = sample(generator, size, task, kind, language)
            source_held = example.source is not None and held_out(example.source)
            if of_two and example.source and len(example.source.things) < 2:
                continue
            if held_out(example.scene) == held and (held or not source_held):
                break
        yield example


def _name(thing: Thing, language: str) -> str:
    if language == "en":
        return f"{thing.colour} {thing.shape}"
    return CHINESE[thing.colour] + CHINESE[thing.shape]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(
    scene: Scene, language: str, named: tuple[str, ...] = ("background",), turned: bool = False
) -> str:
    """Describes a scene in words.

    Args:
        scene: The scene.
        language: `en` or `zh`.
        named: What is told beyond the objects: `size` (of a single object), `background`.
        turned: Put the background first in English, last in Chinese.

    Returns:
        The caption.
    """
    names = [_name(thing, language) for thing in scene.things]
    if "size" in named:
        size = scene.things[0].size
        names[0] = f"{size} {names[0]}" if language == "en" else CHINESE[size] + names[0]
    if language == "en":
        if len(names) == 2:
            words = f"{_a(names[0])} {_BETWEEN[scene.relation]} {_a(names[1])}"
        else:
            words = " and ".join(
                [", ".join(map(_a, names[:-1])), _a(names[-1])] if names[1:] else [_a(names[0])]
            )
        if "background" not in named:
            return words
        return (
            f"a {scene.background} background with {words}"
            if turned
            else f"{words} on a {scene.background} background"
        )
    if len(names) == 2:
        words = f"{names[0]}在{names[1]}的{CHINESE[scene.relation]}"
    elif names[1:]:
        words = "、".join(names[:-1]) + "和" + names[-1]
    else:
        words = "一个" + names[0]
    if "background" not in named:
        return words
    ground = CHINESE[scene.background] + "背景"
    return f"{words}，{ground}" if turned else f"{ground}上的{words}"


def _generate(generator: np.random.Generator, size: Size, kind: str, language: str) -> Example:
    scene = random_scene(generator, size, 1 + KINDS["generate"].index(kind))
    named = ["background"] if generator.random() < 0.85 else []
    if kind == "single" and generator.random() < 0.5:
        named.append("size")
    prompt = caption(scene, language, tuple(named), bool(generator.random() < 0.3))
    return Example("generate", kind, language, prompt, scene, named=tuple(named))


def _edit(generator: np.random.Generator, size: Size, kind: str, language: str) -> Example:
    count = {"move": 1, "add": 2, "remove": 2}.get(kind, 1 + int(generator.integers(2)))
    source = random_scene(generator, size, count)
    which = int(generator.integers(count))
    # The size of a new object is not given.
    while kind == "add" and source.things[which].size != "small":
        source = random_scene(generator, size, count)
    thing = source.things[which]
    name = _name(thing, language)
    others = source.things[:which] + source.things[which + 1 :]

    def changed(thing: Thing) -> Scene:
        return replace(source, things=(*source.things[:which], thing, *source.things[which + 1 :]))

    if kind == "recolour":
        used = {other.colour for other in source.things}
        colour = choice(generator, [colour for colour in COLOURS if colour not in used])
        scene = changed(replace(thing, colour=colour))
        prompt = f"make the {name} {colour}" if language == "en" else f"把{name}变成{CHINESE[colour]}"
    elif kind == "reshape":
        shape = choice(generator, [shape for shape in SHAPES if shape != thing.shape])
        scene = changed(replace(thing, shape=shape))
        prompt = f"turn the {name} into {_a(shape)}" if language == "en" else f"把{name}换成{CHINESE[shape]}"
    elif kind == "move":
        rows, columns = size.grid
        span = SPANS[thing.size]
        ends = {
            "left": replace(thing, column=0),
            "right": replace(thing, column=columns - span),
            "top": replace(thing, row=0),
            "bottom": replace(thing, row=rows - span),
        }
        side = choice(generator, [side for side in _SIDES if ends[side] != thing])
        scene = changed(ends[side])
        if language == "en":
            prompt = f"move the {name} to the {side}"
        else:
            prompt = f"把{name}移到{CHINESE[side]}"
    elif kind == "remove":
        scene = replace(source, things=others, relation="")
        prompt = f"remove the {name}" if language == "en" else f"去掉{name}"
    elif kind == "add":
        scene = source
        relation = source.relation if which == 0 else OPPOSITE[source.relation]
        kept = _name(others[0], language)
        source = replace(source, things=others, relation="")
        if language == "en":
            prompt = f"add {_a(name)} {_BETWEEN[relation]} the {kept}"
        else:
            prompt = f"在{kept}的{CHINESE[relation]}加一个{name}"
    else:
        background = choice(generator, [name for name in BACKGROUNDS if name != source.background])
        scene = replace(source, background=background)
        if language == "en":
            prompt = f"change the background to {background}"
        else:
            prompt = f"把背景换成{CHINESE[background]}"
    return Example("edit", kind, language, prompt, scene, source)


def _understand(generator: np.random.Generator, size: Size, kind: str, language: str) -> Example:
    scene = random_scene(
        generator, size, 2 if kind == "relation" else 1 + int(generator.integers(free_room(size)))
    )
    thing = choice(generator, scene.things)
    english = language == "en"

    def word(name: str) -> str:
        return name if english else CHINESE[name]

    if kind == "colour":
        alone = [one for one in scene.things if [t.shape for t in scene.things].count(one.shape) == 1]
        if not alone:
            return _understand(generator, size, kind, language)
        thing = choice(generator, alone)
        prompt = f"What color is the {thing.shape}?" if english else f"{word(thing.shape)}是什么颜色的？"
        answer = word(thing.colour)
    elif kind == "shape":
        prompt = (
            f"What shape is the {thing.colour} object?"
            if english
            else f"{word(thing.colour)}的物体是什么形状？"
        )
        answer = word(thing.shape)
    elif kind == "background":
        prompt = "What color is the background?" if english else "背景是什么颜色的？"
        answer = word(scene.background)
    elif kind == "count":
        prompt = "How many objects are there?" if english else "有多少个物体？"
        answer = word(_NUMBERS[len(scene.things) - 1])
    elif kind == "presence":
        present = bool(generator.random() < 0.5)
        if not present:
            shown = {(t.shape, t.colour) for t in scene.things}
            others = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in shown]
            shape, colour = choice(generator, others)
            thing = replace(thing, shape=shape, colour=colour)
        name = _name(thing, language)
        prompt = f"Is there {_a(name)}?" if english else f"图中有{name}吗？"
        answer = word("yes" if present else "no")
    elif kind == "relation":
        which = int(generator.integers(2))
        relation = scene.relation if which == 1 else OPPOSITE[scene.relation]
        name = _name(scene.things[which], language)
        prompt = (
            f"What is {_BETWEEN[relation]} the {name}?" if english else f"{name}的{word(relation)}是什么？"
        )
        answer = _name(scene.things[1 - which], language)
    else:
        prompt = DEFAULT_QUESTION[language]
        # One picture, one answer: which object is named first cannot be seen.
        answer = caption(in_order(scene), language)
    return Example("understand", kind, language, prompt, scene, answer=answer)


_SAMPLERS: dict[str, Callable[[np.random.Generator, Size, str, str], Example]] = {
    "generate": _generate,
    "edit": _edit,
    "understand": _understand,
}
