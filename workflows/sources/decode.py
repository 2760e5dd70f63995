"""Bytes of a source picture -> upright opaque RGB, within bounds of pixels and time."""

import io
import time
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from wallaroo.model.errors import RowError
from wallaroo.workflows.sources.references import SourceOptions

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded, by Pillow's names. The many others that it knows are rare and little tested."""
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings a picture upright."""
TILE_WIDTH, TILE_LENGTH = 322, 323
"""Tags of a TIFF file: its tiles, which may be far larger than the picture."""
JPEG_PIECE_BYTES = 1024


# What is wrong with a picture is told in its row, and `decode` has a limit of its own.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class _TooSlow(Exception):
    """Decoding takes longer than allowed."""


class _Timed(io.BytesIO):
    """Bytes that end the decoding of themselves once it has taken too much CPU time.

    A decoder fetches PNG, JPEG, GIF and BMP in pieces, so that a small file with endless work in it is
    stopped between two of them. TIFF, WebP and AVIF are decoded in one go; there the number of pixels
    bounds the work, and libtiff itself the scans of a JPEG within.
    """

    def __init__(self, data: bytes, seconds: float):
        super().__init__(data)
        # A machine that is busy otherwise must not make a picture bad.
        self.end = time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self.end:
            raise _TooSlow
        return super().read(size)


def decode(
    data: bytes,
    name: str = "The picture",
    most_pixels: int = SourceOptions.most_pixels,
    seconds: float = SourceOptions.decode_seconds,
) -> Image.Image:
    """The picture in some bytes: RGB, 8 bits, upright as EXIF says, composed on white, its first frame.

    Of 16 bits the upper 8 are kept. Colour profiles are not applied.
    name: begins the message of the RowError("image") for what is no picture, or breaks a limit.
    """
    if not data:
        raise RowError("image", f"{name} is empty: copy it anew.")
    try:
        with Image.open(_Timed(data, seconds), formats=FORMATS) as image:
            _check_pixels(image, name, most_pixels)
            if image.format in ("JPEG", "MPO"):
                # A progressive one may go over all of its pixels again every 23 bytes.
                image.decodermaxblock = JPEG_PIECE_BYTES
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            rgb = _opaque(image, name)
            return rgb if turn is None else rgb.transpose(turn)
    except RowError:
        raise
    except _TooSlow:
        raise RowError(
            "image", f"{name} takes more than the allowed {seconds:g} seconds to decode: save it anew."
        ) from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(name, most_pixels) from None
    except UnidentifiedImageError:
        raise RowError("image", f"{name} {_unknown(data)}.") from None
    except Exception as error:
        # Broken files make decoders raise nearly anything, MemoryError for an absurd size among it.
        words = "".join(letter for letter in str(error) if letter.isprintable())[:100]
        if "truncated" in words or "broken data stream" in words or isinstance(error, EOFError):
            raise RowError("image", f"{name} is cut short ({words}): copy it anew.") from None
        raise RowError(
            "image", f"{name} is damaged ({words or type(error).__name__}): save it anew."
        ) from None


def _check_pixels(image: Image.Image, name: str, most: int) -> None:
    if image.width * image.height > most:
        raise _too_many_pixels(name, most, f"is {image.width}x{image.height} pixels, ")
    tags = getattr(image, "tag_v2", {})
    if tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0) > most:
        raise _too_many_pixels(name, most)


def _too_many_pixels(name: str, most: int, words: str = "has ") -> RowError:
    return RowError("image", f"{name} {words}more than the allowed {most:,} pixels: make it smaller.")


def _unknown(data: bytes) -> str:
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] == b"<":
        return "holds HTML or XML, not a picture: check where it was copied from"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the picture itself: fetch it with `git lfs pull`"
    return f"is no picture of a common kind ({', '.join(FORMATS)}), or cut short: convert or copy it anew"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, which is upright, where the EXIF data are broken."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _opaque(image: Image.Image, name: str) -> Image.Image:
    """A loaded picture of any mode as RGB, composed on white where it is transparent."""
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise RowError(
            "image", f"{name} has numbers of 32 bits, whose white is not known: save it with 8 or 16 bits."
        )
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits with the upper 8, as Pillow itself does for colours."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
