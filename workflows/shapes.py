"""A world of drawn scenes: what may be in one, how it looks, how it is spoken of, and the data set of it.

A scene has one to three objects, each a shape of a colour, on a plain background. Captions, questions with
answers and edits come in English and Chinese. Everything is drawn from a seed, row by row. Knows nothing of
models; the checker of pictures is `workflows.evaluate`.
"""

import base64
import functools
import hashlib
import io
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from model.config import VQ_FACTOR, Size
from model.errors import InputError
from model.prompts import DEFAULT_QUESTION
from workflows import storage

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (45, 160, 70),
    "blue": (45, 90, 215),
    "purple": (140, 65, 180),
}
"""Of objects, sRGB."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (15, 15, 15),
    "grey": (150, 150, 150),
    "pink": (250, 190, 215),
}

SHAPES = ("circle", "square", "triangle", "cross")

SPANS = {"small": 2, "large": 3}
"""Side of an object's cell, in image tokens; the object keeps MARGIN pixels free on each side."""

MARGIN = 3

RELATIONS = ("left", "right", "above", "below")

LANGUAGES = ("en", "zh")

KINDS = {
    "generate": ("single", "pair", "three"),
    "edit": ("recolour", "reshape", "move", "remove", "add", "background"),
    "understand": ("colour", "shape", "background", "count", "presence", "relation", "caption"),
}
"""Task -> what its rows ask for."""

HARD = {"generate": (), "edit": ("recolour", "reshape", "remove"), "understand": ("caption",)}
"""Task -> the kinds that take a model longest: to tell two objects apart, and to name them all."""

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
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Thing:
    """An object. row, column: of its cell's upper left corner, in image tokens."""

    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A picture to be drawn; height and width in pixels. relation: of the first of two objects to the other,
    empty for one or three objects."""

    height: int
    width: int
    background: str
    things: tuple[Thing, ...]
    relation: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Raises InputError for a text that `to_json` did not write."""
        try:
            values = json.loads(text)
            return cls(**{**values, "things": tuple(Thing(**thing) for thing in values["things"])})
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"'{text[:100]}' is no scene; only rows of `wallaroo data shapes` have one."
            ) from None


@dataclass(frozen=True)
class Example:
    """One row of the data set.

    prompt: caption, instruction or question; scene: of the picture to make, or that is asked about;
    source: of the picture to edit; answer: to a question. named: what the prompt says of the scene
    beyond its objects (`size`, `background`), which is all that a picture can be held to.
    """

    task: str
    kind: str
    language: str
    prompt: str
    scene: Scene
    source: Scene | None = None
    answer: str = ""
    named: tuple[str, ...] = ()


def held_out(scene: Scene) -> bool:
    """Whether a scene's combination of objects, relation and background never occurs in training.

    One combination in eight, by the sha256 of its description. Sizes and places do not count, and the
    same two objects named from the other side are the same combination.
    """
    scene = _in_order(scene)
    things = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    key = f"{' | '.join(things)} | {scene.relation} | {scene.background}"
    return hashlib.sha256(key.encode()).digest()[0] % 8 == 0


def _in_order(scene: Scene) -> Scene:
    """The same scene, two objects named from the left or from above."""
    if scene.relation not in ("right", "below"):
        return scene
    return replace(scene, things=scene.things[::-1], relation=_OPPOSITE[scene.relation])


def draw(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 `(height, width, 3)`, with smooth edges."""
    scale = 4
    image = Image.new("RGB", (scene.width * scale, scene.height * scale), BACKGROUNDS[scene.background])
    pencil = ImageDraw.Draw(image)
    for thing in scene.things:
        side = (SPANS[thing.size] * VQ_FACTOR - 2 * MARGIN) * scale
        left = (thing.column * VQ_FACTOR + MARGIN) * scale
        top = (thing.row * VQ_FACTOR + MARGIN) * scale
        right, bottom, colour = left + side - 1, top + side - 1, COLOURS[thing.colour]
        if thing.shape == "circle":
            pencil.ellipse((left, top, right, bottom), fill=colour)
        elif thing.shape == "square":
            pencil.rectangle((left, top, right, bottom), fill=colour)
        elif thing.shape == "triangle":
            pencil.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=colour)
        else:
            arm = round(0.3 * side)
            pencil.rectangle((left + arm, top, right - arm, bottom), fill=colour)
            pencil.rectangle((left, top + arm, right, bottom - arm), fill=colour)
    return np.array(image.resize((scene.width, scene.height), Image.Resampling.BOX))


def sample(generator: np.random.Generator, size: Size, task: str, kind: str, language: str) -> Example:
    """A random row of one kind. Whether it is held out is up to the caller to ask."""
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
    """Rows of all tasks, kinds, languages and sizes in turn; row n depends on the arguments and n alone. It
    begins with row `first`.

    held: whether the combinations (of an edit, that of its result) are the held-out ones or the others.
    In training both sides of an edit are of the others. hard: whether the kinds in HARD come three times as
    often as others, edits twice of these times of one object of two.
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
        if kind == "three" and _room(size) < 3:
            kind = "pair"
        while True:
            example = sample(generator, size, task, kind, language)
            source_held = example.source is not None and held_out(example.source)
            if of_two and example.source and len(example.source.things) < 2:
                continue
            if held_out(example.scene) == held and (held or not source_held):
                break
        yield example


def _choice(generator: np.random.Generator, items: Any) -> Any:
    return list(items)[int(generator.integers(len(items)))]


def _looks(generator: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Shape and colour of objects, no two of one colour."""
    colours = generator.permutation(list(COLOURS))[:count]
    return [(_choice(generator, SHAPES), str(colour)) for colour in colours]


def _anchors(cells: int, span: int) -> list[int]:
    """Start, middle and end of a line of cells, for an object of so many."""
    return sorted({0, (cells - span) // 2, cells - span})


def _room(size: Size) -> int:
    """How many objects a picture has room for, three at most."""
    return min(3, max(size.grid) // SPANS["small"])


def _scene(generator: np.random.Generator, size: Size, count: int) -> Scene:
    rows, columns = size.grid
    looks = _looks(generator, count)
    background = _choice(generator, BACKGROUNDS)
    if count == 1:
        extent = _choice(generator, SPANS)
        corner = [_choice(generator, _anchors(cells, SPANS[extent])) for cells in (rows, columns)]
        return Scene(*size, background, (Thing(*looks[0], extent, *corner),))
    relation = _choice(generator, RELATIONS) if count == 2 else ""
    sideways = relation in ("left", "right") or (count == 3 and columns >= rows)
    along, across = (columns, rows) if sideways else (rows, columns)
    extents = [_choice(generator, SPANS) for _ in range(count)]
    if sum(SPANS[extent] for extent in extents) > along:
        extents = ["small"] * count
    spans = [SPANS[extent] for extent in extents]
    room = along - sum(spans)
    if count == 2:
        places = [room // 3, along - spans[1] - room // 3]
        if relation in ("right", "below"):
            places = [along - place - span for place, span in zip(places, spans, strict=True)]
        share = _choice(generator, (0.0, 0.5, 1.0))
    else:
        places = [0, spans[0] + room // 2, along - spans[2]]
        share = 0.5
    things = []
    for look, extent, place in zip(looks, extents, places, strict=True):
        aside = int(share * (across - SPANS[extent]))
        things.append(Thing(*look, extent, *((aside, place) if sideways else (place, aside))))
    return Scene(*size, background, tuple(things), relation)


def _name(thing: Thing, language: str) -> str:
    if language == "en":
        return f"{thing.colour} {thing.shape}"
    return CHINESE[thing.colour] + CHINESE[thing.shape]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(
    scene: Scene, language: str, named: tuple[str, ...] = ("background",), turned: bool = False
) -> str:
    """What a scene shows. named: of `size` (of a single object) and `background`, what is said of them.
    turned: the background first in English, last in Chinese."""
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
    scene = _scene(generator, size, 1 + KINDS["generate"].index(kind))
    named = ["background"] if generator.random() < 0.85 else []
    if kind == "single" and generator.random() < 0.5:
        named.append("size")
    prompt = caption(scene, language, tuple(named), bool(generator.random() < 0.3))
    return Example("generate", kind, language, prompt, scene, named=tuple(named))


def _edit(generator: np.random.Generator, size: Size, kind: str, language: str) -> Example:
    count = {"move": 1, "add": 2, "remove": 2}.get(kind, 1 + int(generator.integers(2)))
    source = _scene(generator, size, count)
    which = int(generator.integers(count))
    # Of a new object nobody says how large it is.
    while kind == "add" and source.things[which].size != "small":
        source = _scene(generator, size, count)
    thing = source.things[which]
    name = _name(thing, language)
    others = source.things[:which] + source.things[which + 1 :]

    def changed(thing: Thing) -> Scene:
        return replace(source, things=(*source.things[:which], thing, *source.things[which + 1 :]))

    if kind == "recolour":
        used = {other.colour for other in source.things}
        colour = _choice(generator, [colour for colour in COLOURS if colour not in used])
        scene = changed(replace(thing, colour=colour))
        prompt = f"make the {name} {colour}" if language == "en" else f"把{name}变成{CHINESE[colour]}"
    elif kind == "reshape":
        shape = _choice(generator, [shape for shape in SHAPES if shape != thing.shape])
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
        side = _choice(generator, [side for side in _SIDES if ends[side] != thing])
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
        relation = source.relation if which == 0 else _OPPOSITE[source.relation]
        kept = _name(others[0], language)
        source = replace(source, things=others, relation="")
        if language == "en":
            prompt = f"add {_a(name)} {_BETWEEN[relation]} the {kept}"
        else:
            prompt = f"在{kept}的{CHINESE[relation]}加一个{name}"
    else:
        background = _choice(generator, [name for name in BACKGROUNDS if name != source.background])
        scene = replace(source, background=background)
        if language == "en":
            prompt = f"change the background to {background}"
        else:
            prompt = f"把背景换成{CHINESE[background]}"
    return Example("edit", kind, language, prompt, scene, source)


def _understand(generator: np.random.Generator, size: Size, kind: str, language: str) -> Example:
    scene = _scene(generator, size, 2 if kind == "relation" else 1 + int(generator.integers(_room(size))))
    thing = _choice(generator, scene.things)
    english = language == "en"

    def word(name: str) -> str:
        return name if english else CHINESE[name]

    if kind == "colour":
        alone = [one for one in scene.things if [t.shape for t in scene.things].count(one.shape) == 1]
        if not alone:
            return _understand(generator, size, kind, language)
        thing = _choice(generator, alone)
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
        there = bool(generator.random() < 0.5)
        if not there:
            shown = {(t.shape, t.colour) for t in scene.things}
            others = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in shown]
            shape, colour = _choice(generator, others)
            thing = replace(thing, shape=shape, colour=colour)
        name = _name(thing, language)
        prompt = f"Is there {_a(name)}?" if english else f"图中有{name}吗？"
        answer = word("yes" if there else "no")
    elif kind == "relation":
        which = int(generator.integers(2))
        relation = scene.relation if which == 1 else _OPPOSITE[scene.relation]
        name = _name(scene.things[which], language)
        prompt = (
            f"What is {_BETWEEN[relation]} the {name}?" if english else f"{name}的{word(relation)}是什么？"
        )
        answer = _name(scene.things[1 - which], language)
    else:
        prompt = DEFAULT_QUESTION[language]
        # One picture, one answer: which object is named first cannot be seen.
        answer = caption(_in_order(scene), language)
    return Example("understand", kind, language, prompt, scene, answer=answer)


_SAMPLERS: dict[str, Callable[[np.random.Generator, Size, str, str], Example]] = {
    "generate": _generate,
    "edit": _edit,
    "understand": _understand,
}


def png(scene: Scene) -> bytes:
    """The scene's picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(draw(scene)).save(buffer, "PNG")
    return buffer.getvalue()


def to_values(example: Example, identity: str) -> dict[str, Any]:
    """A row of the data set's Parquet files, which are manifests of their tasks.

    picture: what is to be made; image: what is edited or asked about.
    """
    values: dict[str, Any] = {"id": identity, "task": example.task, "prompt": example.prompt}
    values |= {"language": example.language, "kind": example.kind}
    values |= {"named": " ".join(example.named), "scene": example.scene.to_json()}
    if example.task == "generate":
        values |= {"width": example.scene.width, "height": example.scene.height}
    if example.source is not None:
        values["source_scene"] = example.source.to_json()
    if example.task != "generate":
        values["image"] = png(example.source or example.scene)
    if example.task == "understand":
        values["answer"] = example.answer
    else:
        values["picture"] = png(example.scene)
    return values


def to_line(values: dict[str, Any]) -> str:
    """A row as a line of JSON, its pictures in base64, as `python -m model.train` reads it."""
    plain = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in values.items()}
    return json.dumps(plain, ensure_ascii=False)


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

_COLUMNS = {"image": _IMAGE, "picture": pa.binary(), "width": pa.int32(), "height": pa.int32()}
"""Types of the columns that are no text."""

GROUP_ROWS = 1000


def write(
    output: str,
    rows: int,
    held_out_rows: int,
    seed: int,
    sizes: list[Size],
    lines: bool = False,
    hard: bool = False,
) -> list[str]:
    """Writes the data set into a folder: for each task `train/TASK.parquet` with `rows` rows, and
    `held-out/TASK.parquet` with `held_out_rows`, combinations that the former lack; gives their paths.

    Each file is a manifest of its task. lines: also `train/TASK.jsonl`, which `python -m model.train`
    reads. hard: whether the rows to train on are mostly of the kinds in HARD; those held out are the same
    either way. Raises InputError for a number below one.
    """
    if rows < 1 or held_out_rows < 1:
        raise InputError(
            f"There would be {rows} rows and {held_out_rows} held out; ask for at least one of each."
        )
    written = []
    # No more processes than cores; they are started anew, since a fork would copy the locks of threads.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = (("train", rows, False, hard), ("held-out", held_out_rows, True, False))
        for folder, count, held, mostly_hard in parts:
            for task in KINDS:
                make = functools.partial(_group, folder, count, seed, sizes, held, mostly_hard, task)
                path = storage.join(output, folder, f"{task}.parquet")
                with storage.write_stream(path) as stream:
                    text = io.StringIO() if lines and not held else None
                    _write_parquet(stream, pool.map(make, range(0, count, GROUP_ROWS)), text)
                written.append(path)
                if text is not None:
                    written.append(storage.join(output, folder, f"{task}.jsonl"))
                    storage.write_atomic(written[-1], text.getvalue().encode())
    return written


def _group(
    folder: str, rows: int, seed: int, sizes: list[Size], held: bool, hard: bool, task: str, first: int
) -> list[dict[str, Any]]:
    """The rows of one group of a file, which begins with row `first`."""
    last = min(rows, first + GROUP_ROWS)
    numbered = enumerate(examples(last, seed, sizes, held, (task,), first, hard), first)
    return [to_values(example, f"{folder}-{task}-{number}") for number, example in numbered]


def _write_parquet(stream: Any, groups: Iterable[list[dict[str, Any]]], text: io.StringIO | None) -> None:
    writer = None
    for batch in groups:
        if text is not None:
            text.writelines(to_line(row) + "\n" for row in batch)
        if writer is None:
            writer = pq.ParquetWriter(
                stream,
                pa.schema([(name, _COLUMNS.get(name, pa.string())) for name in batch[0]]),
                compression="zstd",
            )
        for row in batch:
            if "image" in row:
                row["image"] = {"bytes": row["image"], "path": None}
        writer.write_table(pa.Table.from_pylist(batch, writer.schema))
    if writer is not None:
        writer.close()
