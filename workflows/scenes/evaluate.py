"""Scores the output of a run on drawn scenes by looking at it: colours, and the form of what is found.

Nothing here learns, and nothing looks at how a picture was made. Knows nothing of models or Ray.
"""

import io
import itertools
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from wallaroo.model.config import VQ_FACTOR
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import EVALUATION_FILE, list_done
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.shards import open_finished
from wallaroo.workflows.scenes.world import BACKGROUNDS, COLOURS, KINDS, SPANS, Scene, Thing, draw, held_out

FARTHEST_COLOUR = 75.0
"""Euclidean distance in sRGB beyond which a colour is none of the palette's."""

FOREGROUND = 48.0
"""Distance from the background at which an object begins."""

MIN_PIXELS = 40
"""Smaller specks are no objects."""

FARTHEST_PLACE = 8.0
"""Pixels that the centre of an edited picture's object may be off."""

KEPT_DIFFERENCE = 8.0
"""Mean absolute difference, of 255, up to which the untouched part of an edit counts as kept."""


@dataclass(frozen=True)
class Seen:
    """An object found in a picture."""

    shape: str
    """Its shape; empty if the world has no such shape."""
    colour: str
    """Its colour; empty if the world has no such colour."""
    row: float
    """Of its centre, in pixels."""
    column: float
    """Of its centre, in pixels."""
    side: float
    """The longer side of its box, in pixels."""


def look(picture: np.ndarray) -> tuple[str, list[Seen]]:
    """Background (empty if none of the world's) and objects of a picture, uint8 `(H, W, 3)`."""
    from skimage.measure import label, regionprops

    pixels = picture.astype(np.float32)
    border = np.concatenate(
        (pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3))
    )
    border = np.concatenate((border, pixels[:, -2:].reshape(-1, 3)))
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    found = []
    for whole in regionprops(label(distance > FOREGROUND, connectivity=2)):
        if whole.area < MIN_PIXELS:
            continue
        # A soft rim belongs to the object as far as it is nearer to it than to the background.
        near = distance[whole.slice]
        core = whole.image & (near > np.median(near[whole.image]) / 2)
        region = max(regionprops(label(core, connectivity=2)), key=lambda part: part.area)
        top, left = (edge.start for edge in whole.slice)
        first, second, last, end = region.bbox
        centre, side = region.centroid, max(last - first, end - second)
        colour = _nearest(np.median(pixels[whole.slice][core], axis=0), COLOURS)
        found.append(
            Seen(_shape(region), colour, float(top + centre[0]), float(left + centre[1]), float(side))
        )
    return _nearest(ground, BACKGROUNDS), found


def _nearest(colour: np.ndarray, palette: Mapping[str, tuple[int, int, int]]) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= FARTHEST_COLOUR else ""


def _shape(region: Any) -> str:
    """A region's shape by how much of its box (extent) and of its convex hull (solidity) it fills."""
    top, left, bottom, right = region.bbox
    height, width = bottom - top, right - left
    if not 0.75 <= height / width <= 1.34:
        return ""
    if region.extent > 0.85:
        return "square"
    rows, columns = region.image.sum(1), region.image.sum(0)
    # Both arms of a cross reach from side to side through its middle, those of no dented circle do.
    arms = min(rows[height // 2] / width, columns[width // 2] / height)
    if region.solidity < 0.91 and arms > 0.85:
        return "cross" if 0.5 <= region.extent <= 0.8 else ""
    if region.extent >= 0.68:
        return "circle" if region.solidity >= 0.91 else ""
    pointed = rows[: height // 3].mean() < 0.5 * rows[-(height // 3) :].mean()
    return "triangle" if region.extent >= 0.4 and region.solidity >= 0.85 and pointed else ""


def score_picture(picture: np.ndarray, scene: Scene, named: Iterable[str]) -> dict[str, bool]:
    """Scores what of a scene a picture shows.

    Args:
        picture: uint8 [H, W, 3].
        scene: What the prompt asked for.
        named: What the prompt told beyond the objects: `background`, `size`.

    Returns:
        Name of the score -> whether it is right.
    """
    ground, seen = look(picture)
    wanted = sorted((thing.shape, thing.colour) for thing in scene.things)
    shown = sorted((one.shape, one.colour) for one in seen)
    scores = {
        "count": len(seen) == len(scene.things),
        "shape": sorted(one.shape for one in seen) == sorted(thing.shape for thing in scene.things),
        "colour": sorted(one.colour for one in seen) == sorted(thing.colour for thing in scene.things),
        "objects": shown == wanted,
    }
    if "background" in named:
        scores["background"] = ground == scene.background
    if "size" in named:
        middle = VQ_FACTOR * sum(SPANS.values()) / len(SPANS) - 6
        size = "large" if seen and max(one.side for one in seen) > middle else "small"
        scores["size"] = size == scene.things[0].size
    if scene.relation:
        scores["relation"] = shown == wanted and _related(seen, scene)
    return scores


def _related(seen: list[Seen], scene: Scene) -> bool:
    places = [next(one for one in seen if one.colour == thing.colour) for thing in scene.things]
    down, across = places[1].row - places[0].row, places[1].column - places[0].column
    sideways = scene.relation in ("left", "right")
    along, aside = (across, down) if sideways else (down, across)
    if scene.relation in ("right", "below"):
        along = -along
    return along > 0 and along > abs(aside)


def score_edit(picture: np.ndarray, scene: Scene, source: Scene) -> dict[str, bool]:
    """Scores whether an edit did what was asked and kept the rest.

    Args:
        picture: uint8 [H, W, 3].
        scene: What the picture should show.
        source: What the source picture shows.

    Returns:
        `done`: exactly the objects of `scene` are found, each in its place, on its background. `kept`: where
        both scenes are alike, the picture differs from the drawn source by at most KEPT_DIFFERENCE.
    """
    from scipy.ndimage import binary_dilation

    before, after = draw(source), draw(scene)
    if picture.shape != after.shape:
        return {"done": False, "kept": False}
    ground, seen = look(picture)
    done = ground == scene.background and len(seen) == len(scene.things)
    for thing in scene.things:
        row, column = _centre(thing)
        done = done and any(
            (one.shape, one.colour) == (thing.shape, thing.colour)
            and abs(one.row - row) <= FARTHEST_PLACE
            and abs(one.column - column) <= FARTHEST_PLACE
            for one in seen
        )
    # The rim of what changes may be soft.
    untouched = ~binary_dilation((before != after).any(-1), iterations=3)
    difference = np.abs(picture.astype(np.float32) - before)[untouched]
    return {"done": done, "kept": not len(difference) or float(difference.mean()) < KEPT_DIFFERENCE}


def _centre(thing: Thing) -> tuple[float, float]:
    half = SPANS[thing.size] / 2
    return (thing.row + half) * VQ_FACTOR, (thing.column + half) * VQ_FACTOR


def same_answer(given: str, wanted: str) -> bool:
    """Whether two answers are equal, ignoring case, spaces and punctuation.

    Args:
        given: The answer.
        wanted: The right answer.

    Returns:
        True if they are equal.
    """
    return _plain(given) == _plain(wanted)


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in text if letter.isalnum())


def score(row: Mapping[str, Any]) -> dict[str, bool]:
    """Scores one row of an output.

    Returns:
        Name of the score -> whether it is right; `right` is all of them.

    Raises:
        InputError: The row has no scene.
    """
    for name in ("scene", "kind"):
        if not row.get(name):
            raise InputError(
                f"The rows have no column '{name}'; evaluate the output of a run on `wallaroo data shapes`."
            )
    scene, task = Scene.from_json(row["scene"]), row["task"]
    if row["status"] != "ok":
        return {"right": False}
    if task == "understand":
        return {"right": same_answer(row["text"], row["answer"])}
    picture = np.array(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
    if task == "edit":
        scores = score_edit(picture, scene, Scene.from_json(row["source_scene"]))
    else:
        scores = score_picture(picture, scene, row["named"].split())
    return {**scores, "right": all(scores.values())}


@dataclass
class Line:
    """Scores of one cell of the table."""

    task: str
    """`generate`, `edit` or `understand`."""
    kind: str
    """Kind of the rows."""
    language: str
    """Language of the prompts."""
    size: str
    """Size of the pictures."""
    rows: int
    """How many rows."""
    right: dict[str, tuple[int, int]]
    """Name of the score -> rows that are right, and rows that have this score."""


def tabulate(rows: Iterable[Mapping[str, Any]]) -> list[Line]:
    """The table of an output's rows: of each kind one line for all, one a language and one a size."""
    cells: dict[tuple[str, str, str, str], Line] = {}
    for row in rows:
        scores = score(row)
        scene = Scene.from_json(row["scene"])
        size = f"{scene.width}x{scene.height}"
        held = held_out(scene)
        kind = row["kind"] if held else f"{row['kind']} (trained)"
        for language, place in (("all", "all"), (row["language"], "all"), ("all", size)):
            key = (row["task"], kind, language, place)
            line = cells.setdefault(key, Line(*key, 0, {}))
            line.rows += 1
            for name, right in scores.items():
                hits, of = line.right.get(name, (0, 0))
                line.right[name] = (hits + right, of + 1)
    kinds = [kind for group in KINDS.values() for kind in group]
    order = {kind: place for place, kind in enumerate(kinds)}

    def rank(line: Line) -> tuple[Any, ...]:
        plain = line.kind.removesuffix(" (trained)")
        return (
            line.task,
            order.get(plain, len(order)),
            line.kind,
            line.size != "all",
            line.language != "all",
            line.language,
            line.size,
        )

    return sorted(cells.values(), key=rank)


def evaluate(output: str) -> list[Line]:
    """Scores the output of a run on drawn scenes, and writes the table to its `evaluation.json`.

    The report reads the table from there.

    Returns:
        The lines of the table.

    Raises:
        InputError: This is no output, its rows are not of drawn scenes, or it holds an `evaluation.json` that
            this function did not write.
    """
    read_run(output)
    path = storage.join(output, EVALUATION_FILE)
    if not _may_replace(path):
        raise InputError(f"{path} exists, and `wallaroo evaluate` did not write it: move it elsewhere.")
    done = sorted(list_done(output))
    if not done:
        raise InputError(f"{output} holds no results; give the output of a run on `wallaroo data shapes`.")
    table = tabulate(itertools.chain.from_iterable(_rows(output, shard) for shard in done))
    storage.write_atomic(path, to_json(table).encode())
    return table


def _may_replace(path: str) -> bool:
    """Whether a file is absent, or a table that `to_json` made."""
    try:
        found = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return True
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):  # the storage does not serve
            raise
        return False
    return isinstance(found, dict) and found.keys() == {"format", "lines"}


def _rows(output: str, shard: int) -> list[Mapping[str, Any]]:
    needed = (
        "task",
        "status",
        "language",
        "text",
        "image",
        "kind",
        "named",
        "scene",
        "source_scene",
        "answer",
    )
    with open_finished(output, shard) as file:
        there = set(file.schema_arrow.names)
        return file.read([name for name in needed if name in there]).to_pylist()


def to_text(table: list[Line]) -> str:
    """One line for all rows, and the table by cell."""
    # Every row is in one such line.
    whole = [line for line in table if (line.language, line.size) == ("all", "all")]
    rows, right = sum(line.rows for line in whole), sum(line.right["right"][0] for line in whole)
    lines = [f"in all: {right:,} of {rows:,} rows are right, {100 * right / rows:.1f} %"]
    lines += [f"{'task':<11}{'kind':<22}{'language':<9}{'size':<9}{'rows':>5}  right"]
    for line in table:
        shares = [
            f"{name} {100 * hits / of:.1f}" for name, (hits, of) in line.right.items() if name != "right"
        ]
        hits, of = line.right["right"]
        detail = f"  ({', '.join(shares)})" if shares else ""
        cell = f"{line.task:<11}{line.kind:<22}{line.language:<9}{line.size:<9}{line.rows:>5}"
        lines.append(f"{cell}  {100 * hits / of:5.1f} %{detail}")
    return "\n".join(lines)


def to_json(table: list[Line]) -> str:
    """The table as JSON text."""
    return json.dumps({"format": 1, "lines": [asdict(line) for line in table]}, indent=1)
