"""The world of drawn scenes: colours, shapes, places, and how a scene is drawn."""

import hashlib
import io
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from wallaroo.model.config import VQ_FACTOR, Size
from wallaroo.model.errors import InputError

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
KINDS = {
    "generate": ("single", "pair", "three"),
    "edit": ("recolour", "reshape", "move", "remove", "add", "background"),
    "understand": ("colour", "shape", "background", "count", "presence", "relation", "caption"),
}
"""Task -> what its rows ask for."""
HARD = {"generate": (), "edit": ("recolour", "reshape", "remove"), "understand": ("caption",)}
"""Task -> the kinds that take a model longest: to tell two objects apart, and to name them all."""
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """An object."""

    shape: str
    """A key of SHAPES."""
    colour: str
    """A key of COLOURS."""
    size: str
    """A key of SPANS."""
    row: int
    """Of the upper left corner of its cell, in image tokens."""
    column: int
    """Of the upper left corner of its cell, in image tokens."""


@dataclass(frozen=True)
class Scene:
    """A picture to draw."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    background: str
    """A key of BACKGROUNDS."""
    things: tuple[Thing, ...]
    """One to three objects."""
    relation: str = ""
    """Where the first of two objects is, seen from the second; empty for one or three objects."""

    def to_json(self) -> str:
        """The scene as JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """The inverse of `to_json`.

        Raises:
            InputError: The text is no scene.
        """
        try:
            values = json.loads(text)
            return cls(**{**values, "things": tuple(Thing(**thing) for thing in values["things"])})
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"'{text[:100]}' is not a scene; only rows of `wallaroo data shapes` have one."
            ) from None


@dataclass(frozen=True)
class Example:
    """One row of the data set."""

    task: str
    """`generate`, `edit` or `understand`."""
    kind: str
    """Kind of the prompt."""
    language: str
    """`en` or `zh`."""
    prompt: str
    """Caption, instruction or question."""
    scene: Scene
    """Of the picture to make, or that the question is about."""
    source: Scene | None = None
    """Of the picture to edit."""
    answer: str = ""
    """To the question."""
    named: tuple[str, ...] = ()
    """What the prompt tells of the scene beyond its objects: `size`, `background`.

    A picture is scored on nothing else.
    """


def held_out(scene: Scene) -> bool:
    """Whether a scene's combination of objects, relation and background never occurs in training.

    One combination in eight, by the sha256 of its description. Sizes and places do not count, and the
    same two objects named from the other side are the same combination.
    """
    scene = in_order(scene)
    things = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    key = f"{' | '.join(things)} | {scene.relation} | {scene.background}"
    return hashlib.sha256(key.encode()).digest()[0] % 8 == 0


def in_order(scene: Scene) -> Scene:
    """The same scene, two objects named from the left or from above."""
    if scene.relation not in ("right", "below"):
        return scene
    return replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation])


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


def choice(generator: np.random.Generator, items: Any) -> Any:
    """One of the items at random.

    Args:
        generator: Of random numbers.
        items: The items, all equally likely.

    Returns:
        The item.
    """
    return list(items)[int(generator.integers(len(items)))]


def random_looks(generator: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Draws the shapes and colours of objects, each of another colour.

    Args:
        generator: Of random numbers.
        count: How many objects.

    Returns:
        Shape and colour of each.
    """
    colours = generator.permutation(list(COLOURS))[:count]
    return [(choice(generator, SHAPES), str(colour)) for colour in colours]


def anchors(cells: int, span: int) -> list[int]:
    """The places of an object on a line: at its start, in the middle and at its end.

    Args:
        cells: Length of the line, in image tokens.
        span: Length of the object, in image tokens.

    Returns:
        The first cell of the object for each place, in order, each once.
    """
    return sorted({0, (cells - span) // 2, cells - span})


def free_room(size: Size) -> int:
    """How many objects a picture has room for, three at most."""
    return min(3, max(size.grid) // SPANS["small"])


def random_scene(generator: np.random.Generator, size: Size, count: int) -> Scene:
    """Draws a scene.

    Args:
        generator: Of random numbers.
        size: Of the picture, in pixels.
        count: How many objects, 1 to 3.

    Returns:
        The scene; two objects have a relation.
    """
    rows, columns = size.grid
    looks = random_looks(generator, count)
    background = choice(generator, BACKGROUNDS)
    if count == 1:
        extent = choice(generator, SPANS)
        corner = [choice(generator, anchors(cells, SPANS[extent])) for cells in (rows, columns)]
        return Scene(*size, background, (Thing(*looks[0], extent, *corner),))
    relation = choice(generator, RELATIONS) if count == 2 else ""
    sideways = relation in ("left", "right") or (count == 3 and columns >= rows)
    along, across = (columns, rows) if sideways else (rows, columns)
    extents = [choice(generator, SPANS) for _ in range(count)]
    if sum(SPANS[extent] for extent in extents) > along:
        extents = ["small"] * count
    spans = [SPANS[extent] for extent in extents]
    room = along - sum(spans)
    if count == 2:
        places = [room // 3, along - spans[1] - room // 3]
        if relation in ("right", "below"):
            places = [along - place - span for place, span in zip(places, spans, strict=True)]
        share = choice(generator, (0.0, 0.5, 1.0))
    else:
        places = [0, spans[0] + room // 2, along - spans[2]]
        share = 0.5
    things = []
    for look, extent, place in zip(looks, extents, places, strict=True):
        aside = int(share * (across - SPANS[extent]))
        things.append(Thing(*look, extent, *((aside, place) if sideways else (place, aside))))
    return Scene(*size, background, tuple(things), relation)


def png(scene: Scene) -> bytes:
    """The scene's picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(draw(scene)).save(buffer, "PNG")
    return buffer.getvalue()
