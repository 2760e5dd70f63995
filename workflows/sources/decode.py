"""Bytes of a source picture -> upright opaque RGB, within bounds of pixels and time."""

import functools
import io
import math
import struct
import time
import warnings

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from wallaroo.model.errors import RowError
from wallaroo.workflows.sources.references import SourceOptions

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats to decode, by Pillow's names. It knows many others, which are rare and little tested."""
HEIF_BRANDS = frozenset(
    ("heic", "heix", "hevc", "heim", "heis", "hevm", "hevs", "hevx", "mif1", "msf1", "mif2")
)
"""Brands of HEIF files; one of them follows `ftyp`."""
MAX_PROFILE_BYTES = 8 << 20
"""Most bytes of a colour profile; a longer one counts as broken. Printing presses have up to 3 MiB."""
NOTE = "wallaroo.note"
"""Key in the `info` of a picture for a note of `decode`."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> operation that turns the picture upright."""
TILE_WIDTH, TILE_LENGTH = 322, 323
"""Tags of a TIFF file: its tiles, which may be far larger than the picture."""
JPEG_PIECE_BYTES = 1024


# Faults of a picture are reported in its row, and `decode` has a limit of its own.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# Pillow refuses a PNG file with a profile over 1 MiB, which is no reason to refuse the picture.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_PROFILE_BYTES)


class _TooSlow(Exception):
    """Decoding takes longer than allowed."""


class _Timed(io.BytesIO):
    """Bytes that stop their own decoding after too much CPU time.

    A decoder reads PNG, JPEG, GIF and BMP in pieces, so a small file with endless work is stopped between two
    of them. TIFF, WebP and AVIF are decoded in one go. For them the number of pixels bounds the work, and
    libtiff itself bounds the scans of a JPEG within.
    """

    def __init__(self, data: bytes, seconds: float):
        super().__init__(data)
        # CPU time, since a busy machine must not make a picture fail.
        self.end = time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self.end:
            raise _TooSlow
        return super().read(size)


def decode(
    data: bytes,
    name: str = "The image",
    most_pixels: int = SourceOptions.most_pixels,
    seconds: float = SourceOptions.decode_seconds,
) -> Image.Image:
    """Decodes a picture: first frame, sRGB, 8 bits, upright by its EXIF data, composed on white.

    Of 16 bits the upper 8 are kept. Colours of a picture with an ICC profile are converted to sRGB. A profile
    that is broken, or made for other channels, is ignored. HEIF needs pillow-heif.

    Args:
        data: A file in one of FORMATS, or HEIF.
        name: Name of the picture; messages begin with it.
        most_pixels: Most pixels of the picture.
        seconds: CPU seconds after which decoding stops.

    Returns:
        The picture in mode RGB. `info[NOTE]` is set if a profile or colour space was ignored.

    Raises:
        RowError: ("image") The bytes are no picture, are damaged, or break a limit.
    """
    if not data:
        raise RowError("image", f"{name} is empty: copy it again.")
    try:
        formats = (*FORMATS, "HEIF") if _has_heif() else FORMATS
        with Image.open(_Timed(data, seconds), formats=formats) as image:
            _check_pixels(image, name, most_pixels)
            if image.format in ("JPEG", "MPO"):
                # A progressive JPEG may rewrite all of its pixels every 23 bytes.
                image.decodermaxblock = JPEG_PIECE_BYTES
            key = image.info.get("transparency")
            deep = image.tile and image.tile[0].args == _DEEP
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            if deep and isinstance(key, tuple):
                del image.info["transparency"]
                image.putalpha(_deep_alpha(np.asarray(image), data, key, seconds))
            rgb, note = _opaque(image, name)
            if image.format == "PNG" and not note and "icc_profile" not in image.info:
                note = _ignored_colours(image, data)
            rgb = rgb if turn is None else rgb.transpose(turn)
            rgb.info = {NOTE: note} if note else {}
            return rgb
    except RowError:
        raise
    except _TooSlow:
        raise RowError(
            "image", f"{name} takes more than the allowed {seconds:g} seconds to decode: save it again."
        ) from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(name, most_pixels) from None
    except UnidentifiedImageError:
        raise RowError("image", f"{name} {_unknown(data)}.") from None
    except Exception as error:
        # Broken files make decoders raise nearly anything, even MemoryError for an absurd size.
        words = "".join(letter for letter in str(error) if letter.isprintable())[:100]
        if "truncated" in words or "broken data stream" in words or isinstance(error, EOFError):
            raise RowError("image", f"{name} is truncated ({words}): copy it again.") from None
        raise RowError(
            "image", f"{name} is damaged ({words or type(error).__name__}): save it again."
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
        return "holds HTML or XML, not an image: check its origin"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the image itself: fetch it with `git lfs pull`"
    if data[4:8] == b"ftyp" and data[8:12].decode("latin-1") in HEIF_BRANDS:
        if _has_heif():
            return "is a HEIC or HEIF file without a readable image: copy it again"
        return "is a HEIC or HEIF image: install wallaroo-batch[heif] on every node, or convert it"
    return (
        f"is not an image in a supported format ({', '.join(FORMATS)}), or is truncated: "
        f"convert it or copy it again"
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if the EXIF data are broken."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


@functools.cache
def _has_heif() -> bool:
    """Whether Pillow reads HEIF, which needs pillow-heif installed and registered."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


_DEEP, _DEEP_LOWER = "RGB;16B", "RGB;16L"
"""Pillow's names for PNG's colours of 16 bits, and for taking the lower 8 of these bits."""


def _deep_alpha(upper: np.ndarray, data: bytes, key: tuple[int, int, int], seconds: float) -> Image.Image:
    """Finds where a PNG picture has its transparent colour of 16 bits, of which Pillow compares 8."""
    with Image.open(_Timed(data, seconds), formats=("PNG",)) as again:
        again.tile = [tile._replace(args=_DEEP_LOWER) for tile in again.tile]
        again.load()
        lower = np.asarray(again)
    # Band by band, since numbers of 16 bits would take twice the memory of the picture.
    same = np.ones(upper.shape[:2], bool)
    for band, value in enumerate(key):
        same &= (upper[..., band] == value >> 8) & (lower[..., band] == value & 255)
    return Image.fromarray(np.where(same, np.uint8(0), np.uint8(255)))


_SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_SRGB_CODE = bytes((1, 13, 0, 1))
"""What PNG's chunks cHRM and cICP hold for sRGB, whose gAMA is 1/2.2."""


def _ignored_colours(image: Image.Image, data: bytes) -> str:
    """Says which chunk of a PNG file names a colour space other than sRGB; empty if none does."""
    code = _png_chunk(data, b"cICP")
    if code is not None:
        return "" if code == _SRGB_CODE else "its colour space (PNG chunk cICP) was ignored"
    if "srgb" in image.info:
        return ""
    gamma, chromaticity = image.info.get("gamma"), image.info.get("chromaticity")
    if gamma and abs(gamma * 2.2 - 1) > 0.05:
        return f"its gamma of {gamma:g} (PNG chunk gAMA) was ignored"
    same = zip(chromaticity or (), _SRGB_CHROMATICITY, strict=False)
    if not all(math.isclose(one, other, abs_tol=0.01) for one, other in same):
        return "its colour space (PNG chunk cHRM) was ignored"
    return ""


def _png_chunk(data: bytes, name: bytes) -> bytes | None:
    """Contents of a chunk before the pixels of a PNG file; None if there is none."""
    place = 8
    while place + 8 <= len(data):
        length, found = struct.unpack_from(">I4s", data, place)
        if found in (name, b"IDAT"):
            return data[place + 8 : place + 8 + length] if found == name else None
        place += 12 + length
    return None


def _opaque(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    """Converts a loaded picture of any mode to sRGB, composed on white. Also returns a note."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise RowError(
            "image", f"{name} has 32-bit channels, which are not supported: convert it to 8 or 16 bits."
        )
    if not image.has_transparency_data:
        return _srgb(image, profile)
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    colours = image.getchannel("L") if image.mode in ("L", "LA") else layer.convert("RGB")
    opaque, note = _srgb(colours, profile)
    white = Image.new("RGB", image.size, "white")
    white.paste(opaque, mask=layer.getchannel("A"))
    return white, note


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Converts an opaque picture to RGB by its ICC profile. Also returns why the profile was ignored."""
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    note = ""
    if profile:
        found = _transform(profile, image.mode)
        if isinstance(found, str) and image.mode != "RGB":
            image, found = image.convert("RGB"), _transform(profile, "RGB")
        if isinstance(found, str):
            note = found
        elif found is not None:
            try:
                return found.apply(image), ""
            except ValueError:
                note = _BROKEN
    return (image if image.mode == "RGB" else image.convert("RGB")), note


_CHANNELS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of the pictures that it is for."""
_BROKEN = "its colour profile is broken and was ignored"


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | str | None:
    """Builds the transform from a profile to sRGB; None if it is sRGB itself, words if it is ignored."""
    if len(profile) > MAX_PROFILE_BYTES:
        return f"its colour profile has more than {MAX_PROFILE_BYTES >> 20} MiB and was ignored"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if _CHANNELS.get(space) != mode:
            shown = "".join(letter for letter in space if letter.isalnum())
            return f"its colour profile is for {shown or 'other'} images and was ignored"
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "RGB":
            # Most profiles are sRGB under one of many names, and would change pixels by rounding only.
            before = _colours()
            after = np.asarray(ImageCms.applyTransform(before, transform), np.int16)
            if np.abs(after - np.asarray(before, np.int16)).max() <= 1:
                return None
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return _BROKEN
    return transform


@functools.cache
def _colours() -> Image.Image:
    """4,913 colours, evenly spread."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keeps the upper 8 bits of a grey picture with 16, as Pillow does for colours."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
