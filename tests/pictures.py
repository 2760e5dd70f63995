"""Pictures to load: real ones out of installed packages, and files of every kind made from one of them.

`write_pictures` makes the files and says of each what a loader must make of it.
"""

import importlib.util
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

WIDTH, HEIGHT = 300, 200


@dataclass(frozen=True)
class Picture:
    """A file and what it holds.

    reason: part of the message that refuses it; empty for a good one. pixels: uint8 [h, w, 3], what a
    good one looks like, upright and on white; tolerance: how far it may be off on average.
    """

    path: Path
    reason: str = ""
    pixels: np.ndarray | None = None
    tolerance: float = 0.0


def real_pictures() -> list[Path]:
    """The pictures that scikit-image, scikit-learn and matplotlib bring along, less one of 64-bit numbers."""
    found: list[Path] = []
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images"), ("matplotlib", "mpl-data")):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
        root = Path(spec.submodule_search_locations[0], folder)
        files = sorted(root.rglob("*") if package != "matplotlib" else root.glob("sample_data/*"))
        found += [path for path in files if path.suffix in (".png", ".jpg", ".tif", ".gif")]
    return [path for path in found if path.name != "multipage_rgb.tif"]


def base() -> np.ndarray:
    """The picture that all files of `write_pictures` are made from: a cat, uint8 [200, 300, 3]."""
    path = next(path for path in real_pictures() if path.name == "chelsea.png")
    with Image.open(path) as image:
        return np.array(image.convert("RGB").crop((70, 40, 70 + WIDTH, 40 + HEIGHT)))


def write_pictures(folder: Path) -> list[Picture]:
    """Writes good and bad files into a folder, which it makes, and tells what each is."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, data, reason, pixels, tolerance in _files():
        (folder / name).write_bytes(data)
        made.append(Picture(folder / name, reason, pixels, tolerance))
    return made


_File = tuple[str, bytes, str, np.ndarray | None, float]


def _files() -> Iterator[_File]:
    pixels = base()
    for name, data, expected, tolerance in _good(pixels):
        yield name, data, "", expected, tolerance
    for name, data, reason in _bad(pixels):
        yield name, data, reason, None, 0.0


def save(image: Image.Image, form: str, **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    # Copies, since Pillow keeps in a picture what it was last saved with.
    others = {"append_images": [one.copy() for one in options.get("append_images", ())]}
    image.copy().save(file, form, **options | (others if others["append_images"] else {}))
    return file.getvalue()


def _good(pixels: np.ndarray) -> Iterator[tuple[str, bytes, np.ndarray, float]]:
    image = Image.fromarray(pixels)
    inverted = Image.fromarray(255 - pixels)
    jpeg = {"quality": 95, "subsampling": 0}
    yield "plain.png", save(image, "PNG"), pixels, 0
    yield "plain.jpg", save(image, "JPEG", **jpeg), pixels, 2
    yield "progressive.jpg", save(image, "JPEG", progressive=True, **jpeg), pixels, 2
    yield "lossless.webp", save(image, "WEBP", lossless=True), pixels, 0
    yield "lossy.webp", save(image, "WEBP", quality=95), pixels, 3
    yield "plain.bmp", save(image, "BMP"), pixels, 0
    yield "plain.tif", save(image, "TIFF"), pixels, 0
    yield "lzw.tif", save(image, "TIFF", compression="tiff_lzw"), pixels, 0
    yield "phone.mpo.jpg", save(image, "MPO", save_all=True, append_images=[inverted], **jpeg), pixels, 2
    if features.check("avif"):
        yield "lossy.avif", save(image, "AVIF", quality=95), pixels, 3
    yield "bäckerei 画像.png", save(image, "PNG"), pixels, 0
    yield "wrong-suffix.png", save(image, "JPEG", **jpeg), pixels, 2

    # What a row and a column of the stored picture are in the upright one: the definitions of EXIF.
    across, down, turned = pixels[:, ::-1], pixels[::-1], pixels.transpose(1, 0, 2)
    stored = {
        1: pixels,
        2: across,
        3: down[:, ::-1],
        4: down,
        5: turned,
        6: turned[::-1],
        7: turned[::-1, ::-1],
        8: turned[:, ::-1],
    }
    for orientation, values in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned_image = Image.fromarray(np.ascontiguousarray(values))
        yield f"exif-{orientation}.jpg", save(turned_image, "JPEG", exif=exif, **jpeg), pixels, 2
        if orientation == 6:
            yield "exif-6.png", save(turned_image, "PNG", exif=exif), pixels, 0
            yield "exif-6.webp", save(turned_image, "WEBP", exif=exif, lossless=True), pixels, 0
            tiff = {"tiffinfo": {0x0112: 6}, "compression": "tiff_lzw"}
            yield "exif-6.tif", save(turned_image, "TIFF", **tiff), pixels, 0
    yield "exif-broken.jpg", save(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", **jpeg), pixels, 2

    cmyk = image.convert("CMYK")
    yield "cmyk.jpg", save(cmyk, "JPEG", **jpeg), pixels, 4
    yield "cmyk.tif", save(cmyk, "TIFF"), pixels, 0

    grey = image.convert("L")
    grey_pixels = np.repeat(np.asarray(grey)[:, :, None], 3, 2)
    yield "grey.png", save(grey, "PNG"), grey_pixels, 0
    yield "grey.jpg", save(grey, "JPEG", **jpeg), grey_pixels, 2
    one = image.convert("1")
    yield "one-bit.png", save(one, "PNG"), np.array(one.convert("RGB")), 0
    yield "one-bit.tif", save(one, "TIFF", compression="group4"), np.array(one.convert("RGB")), 0
    few = image.quantize(64)
    yield "palette.png", save(few, "PNG"), np.array(few.convert("RGB")), 0

    # Lower bytes that are not those of the upper ones, since they are dropped.
    deep = (pixels.astype(np.uint16) << 8) + 93
    yield "16-bit.png", png(deep, 2), pixels, 0
    yield "16-bit-grey.png", png(deep[:, :, :1], 0), np.repeat(pixels[:, :, :1], 3, 2), 0
    deep_grey = Image.fromarray(deep[:, :, 0])
    yield "16-bit-grey.tif", save(deep_grey, "TIFF"), np.repeat(pixels[:, :, :1], 3, 2), 0

    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, 100:200] = 102
    alpha[:, 200:] = 0
    weight = alpha[:, :, None] / 255
    on_white = np.round(pixels * weight + 255 * (1 - weight)).astype(np.uint8)
    clear = image.copy()
    clear.putalpha(Image.fromarray(alpha))
    yield "rgba.png", save(clear, "PNG"), on_white, 0.5
    yield "rgba.webp", save(clear, "WEBP", lossless=True, exact=True), on_white, 0.5
    yield "rgba.tif", save(clear, "TIFF"), on_white, 0.5
    yield "16-bit-rgba.png", png(np.dstack([deep, alpha.astype(np.uint16) * 257]), 6), on_white, 0.5
    grey_clear = clear.convert("LA")
    grey_on_white = np.round(grey_pixels * weight + 255 * (1 - weight)).astype(np.uint8)
    yield "grey-alpha.png", save(grey_clear, "PNG"), grey_on_white, 0.5
    holed = few.copy()
    hole = holed.getpixel((0, 0))
    holed_pixels = np.where((np.asarray(holed) == hole)[:, :, None], 255, np.array(few.convert("RGB")))
    yield "palette-transparent.png", save(holed, "PNG", transparency=hole), holed_pixels, 0
    yield "palette-transparent.gif", save(holed, "GIF", transparency=hole), holed_pixels, 0
    colour = tuple(int(value) for value in pixels[0, 0])
    keyed = np.where((pixels == pixels[0, 0]).all(2)[:, :, None], np.uint8(255), pixels)
    yield "rgb-transparent.png", save(image, "PNG", transparency=colour), keyed, 0
    key = struct.pack(">H", int(deep[0, 0, 0]))
    keyed = np.where(pixels[:, :, :1] == pixels[0, 0, 0], np.uint8(255), pixels[:, :, :1])
    yield "16-bit-grey-transparent.png", png(deep[:, :, :1], 0, tRNS=key), np.repeat(keyed, 3, 2), 0
    # The colours of the right half differ from those of the left one in their lower 8 bits alone.
    deep_colour = deep.astype(np.uint16)
    deep_colour[:, WIDTH // 2 :] = deep_colour[:, : WIDTH // 2] ^ 1
    upper = (deep_colour >> 8).astype(np.uint8)
    key = struct.pack(">3H", *deep_colour[0, 0].tolist())
    keyed = np.where((deep_colour == deep_colour[0, 0]).all(2)[:, :, None], np.uint8(255), upper)
    yield "16-bit-rgb-transparent.png", png(deep_colour, 2, tRNS=key), keyed, 0
    # A colour that only the lower bits of a key equal.
    key = struct.pack(">3H", *upper[0, 0].tolist())
    yield "16-bit-rgb-transparent-nowhere.png", png(deep_colour, 2, tRNS=key), upper, 0

    moving = {"save_all": True, "append_images": [inverted, image], "duration": 100, "loop": 0}
    few_moving = moving | {"append_images": [few.transpose(Image.Transpose.ROTATE_180)]}
    yield "animated.gif", save(few, "GIF", **few_moving), np.array(few.convert("RGB")), 0
    yield "animated.webp", save(image, "WEBP", lossless=True, **moving), pixels, 0
    yield "animated.png", save(image, "PNG", **moving), pixels, 0
    pages = {"save_all": True, "append_images": [inverted]}
    yield "pages.tif", save(image, "TIFF", **pages), pixels, 0

    yield "1x1.png", save(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"), np.array([[[10, 20, 30]]]), 0
    yield "1x200.png", save(Image.new("RGB", (1, 200), "red"), "PNG"), np.tile([255, 0, 0], (200, 1, 1)), 0


def _bad(pixels: np.ndarray) -> Iterator[tuple[str, bytes, str]]:
    image = Image.fromarray(pixels)
    yield "20000x10.png", save(Image.new("RGB", (20000, 10)), "PNG"), "at most 200 times"
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF"):
        data = save(image, form)
        yield f"truncated.{form.lower()}", data[: len(data) * 2 // 3], "truncated"
    data = save(image, "WEBP")
    yield "truncated.webp", data[: len(data) * 2 // 3], "damaged"
    yield "truncated-header.png", save(image, "PNG")[:20], "is truncated|damaged"
    yield "empty.jpg", b"", "is empty"
    page = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>gone</body></html>\n"
    yield "html.jpg", page, "HTML"
    yield "drawing.png", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "XML"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    yield "pointer.png", pointer, "git lfs pull"
    yield "text.png", b"a cat\n" * 100, "not an image in a supported format"
    yield "zeros.png", bytes(4096), "not an image in a supported format"
    yield (
        "drawing.eps",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
        "not an image in a supported",
    )
    data = bytearray(save(image, "PNG"))
    data[len(data) // 2] ^= 0xFF
    yield "damaged.png", bytes(data), "is truncated|damaged"
    yield "bomb.png", bomb(30000), "more than the allowed .* pixels"
    yield "small-bomb.png", bomb(9000), "is 9000x9000 pixels, more than the allowed"
    # A canvas of one pixel, on which stands a frame of 65535x65535.
    frame = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\0\0\0,\0\0\0\0" + struct.pack("<HH", 65535, 65535)
    yield "bomb.gif", frame + b"\0\x02\x02L\x01\0;", "more than the allowed .* pixels"
    yield "bomb.tif", tile_bomb(), "more than the allowed .* pixels"
    yield "float.tif", save(Image.new("F", (40, 30), 0.5), "TIFF"), "32-bit channels"


def png(values: np.ndarray, kind: int, **chunks: bytes) -> bytes:
    """A PNG file of 16 bits, which Pillow reads but does not write. values: uint16 [h, w, channels]; kind:
    the colour type that the format gives them; chunks: further ones, by name."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [("IHDR", header), *chunks.items(), ("IDAT", zlib.compress(rows)), ("IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def bomb(side: int) -> bytes:
    """A valid PNG file, a thousand times smaller than its black square with sides of so many pixels."""
    pack = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(pack.compress(row * 1000) for _ in range(side // 1000)) + pack.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk("IHDR", header) + _chunk("IDAT", data) + _chunk("IEND", b"")


def tile_bomb() -> bytes:
    """A TIFF file of 16x16 pixels, a corner of the one tile of 40000x40000 that it is stored in."""
    data = zlib.compress(bytes(1000))
    short, long = 3, 4
    tags = [(256, short, 16), (257, short, 16), (258, short, 8), (259, short, 8), (262, short, 1)]
    tags += [(277, short, 1), (322, long, 40000), (323, long, 40000), (324, long, 0), (325, long, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [
        struct.pack("<HHII", tag, kind, 1, start if tag == 324 else value) for tag, kind, value in tags
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


def _chunk(name: str, data: bytes) -> bytes:
    body = name.encode() + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
