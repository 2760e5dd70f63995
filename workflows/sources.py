"""Source pictures: fetched from wherever a manifest says, decoded, and made ready for the model.

    references of a shard -> fetch_many (threads) -> decode -> prepare

What a manifest says is not trusted: where a source may come from, its bytes, its pixels and the time to
decode it are bounded. A source that cannot be had or is no picture is a RowError("image") and harms no
other row; a storage that is out of order is nobody's fault and an InputError once patience is at its
end. Knows nothing of Ray, of plans, or of what the model does with a picture.
"""

import errno
import functools
import hashlib
import io
import os
import posixpath
import random
import re
import stat
import threading
import time
import urllib.parse
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from model.config import ModelConfig, Size
from model.errors import InputError, RowError
from model.images import FACTOR, pixel_image, semantic_image
from workflows import https, storage
from workflows.https import shown, without_query

Reference = str | bytes | Mapping[str, Any] | None
"""What stands in a manifest's `image`: a path or address, the bytes, or `{bytes, path}`."""

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

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0

# What is wrong with a picture is told in its row, and `decode` has a limit of its own.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class SourceOptions:
    """Where sources may come from, and what bounds them.

    folder: of the manifest, local or `s3://`; relative paths start there. https: whether https://
    sources are allowed. outside: whether relative paths may leave the folder, by `..` or by links.
    most_bytes: of a file. most_pixels: of a picture. decode_seconds: of CPU time for one picture.
    patience_seconds: how long a storage that does not serve is asked again. fetches: sources that are
    fetched at once, and so the most that wait in memory to be decoded.
    """

    folder: str
    https: bool = False
    outside: bool = False
    most_bytes: int = 128 << 20
    most_pixels: int = 1 << 26
    decode_seconds: float = 20
    patience_seconds: float = 120
    fetches: int = 8


@dataclass(frozen=True)
class Fetched:
    """A source's bytes, and where they are from: an absolute path, an address without its query, or for
    bytes in the manifest the path that stands beside them."""

    uri: str
    data: bytes

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def name(self) -> str:
        """How messages begin that are about this source."""
        return shown(self.uri) if self.uri else "The picture in the manifest"


@dataclass(frozen=True)
class Prepared:
    """A picture as a `model.engine.Request` wants it.

    width, height: of the upright source, in pixels. semantic: uint8 [h, w, 3]; grid: rows and columns
    of its merged tokens. size: of the picture that an edit makes, pixels: uint8 [H, W, 3] of that size;
    both None for understanding.
    """

    width: int
    height: int
    semantic: np.ndarray
    grid: tuple[int, int]
    size: Size | None = None
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """A source made ready. uri, sha256: as `Fetched` has them."""

    uri: str
    sha256: str
    prepared: Prepared


def load_many(
    references: Sequence[Reference], task: str, config: ModelConfig, options: SourceOptions
) -> Iterator[tuple[list[int], Source | RowError]]:
    """Every distinct source of a shard once, with the positions that name it, made ready or refused.

    While one is decoded the next ones are fetched; no more than one decoded picture is held at a time.
    Raises InputError as `fetch` does.
    """
    for positions, fetched in fetch_many(references, options):
        made = fetched if isinstance(fetched, RowError) else _load(fetched, task, config, options)
        del fetched
        yield positions, made


def _load(fetched: Fetched, task: str, config: ModelConfig, options: SourceOptions) -> Source | RowError:
    try:
        image = decode(fetched.data, fetched.name, options.most_pixels, options.decode_seconds)
        return Source(fetched.uri, fetched.sha256, prepare(image, task, config, fetched.name))
    except RowError as error:
        return error


# Fetching


def fetch_many(
    references: Sequence[Reference], options: SourceOptions
) -> Iterator[tuple[list[int], Fetched | RowError]]:
    """Every distinct reference once, with its positions, in the order of the first ones.

    At most `options.fetches` sources are under way or waiting. Raises InputError as `fetch` does.
    """
    groups: dict[Any, list[int]] = {}
    for position, reference in enumerate(references):
        groups.setdefault(_identity(reference), []).append(position)
    waiting: deque[tuple[list[int], Future[Fetched | RowError]]] = deque()
    pool = ThreadPoolExecutor(options.fetches, thread_name_prefix="fetch")
    try:
        for positions in groups.values():
            if len(waiting) == options.fetches:
                yield _finished(waiting.popleft())
            waiting.append((positions, pool.submit(_fetched, references[positions[0]], options)))
        while waiting:
            yield _finished(waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(one: tuple[list[int], "Future[Fetched | RowError]"]) -> tuple[list[int], Fetched | RowError]:
    return one[0], one[1].result()


def _fetched(reference: Reference, options: SourceOptions) -> Fetched | RowError:
    try:
        return fetch(reference, options)
    except RowError as error:
        return error


def _identity(reference: Reference) -> Any:
    """Equal for references that lead to the same bytes; never holds the bytes."""
    if isinstance(reference, Mapping):
        return _identity(reference.get("bytes")), _identity(reference.get("path"))
    if isinstance(reference, bytes):
        return hashlib.sha256(reference).digest()
    return repr(reference)


def fetch(
    reference: Reference,
    options: SourceOptions,
    download: Callable[[str, int], bytes] = https.download,
) -> Fetched:
    """The bytes that a reference leads to.

    download: address and most bytes -> bytes, in place of `https.download`.
    Raises RowError("image") if there is no such source, it may not be read, or has too many bytes, and
    for a web host that does not serve; InputError for a storage that does not.
    """
    data, path = parts_of(reference)
    if data is not None:
        fetched = Fetched(path, data)
        if len(data) > options.most_bytes:
            raise _too_many_bytes(fetched.name, options.most_bytes)
        return fetched
    place = locate(path, options)
    most, patience = options.most_bytes, options.patience_seconds
    if place.startswith("https://"):
        uri = without_query(place)
        host = urllib.parse.urlsplit(uri).netloc
        return Fetched(uri, _patiently(host, lambda: _download(place, most, download), patience))
    if place.startswith("s3://"):
        bucket = place.removeprefix("s3://").partition("/")[0]
        return Fetched(place, _patiently(f"s3://{bucket}", lambda: _read_object(place, most), patience))
    return Fetched(place, _patiently("", lambda: _read_file(place, most), patience))


def parts_of(reference: Reference) -> tuple[bytes | None, str]:
    """Bytes and path of a reference; one of the two is there."""
    data, path = reference, None
    if isinstance(reference, Mapping):
        data, path = reference.get("bytes"), reference.get("path")
    if isinstance(data, str) and path is None:
        data, path = None, data
    if data is not None and not isinstance(data, bytes):
        raise RowError(
            "image", f"image is of type {type(data).__name__}, but must be a path, bytes or {{bytes, path}}."
        )
    if path is not None and not isinstance(path, str):
        raise RowError("image", f"path of image is of type {type(path).__name__}, but must be text.")
    if data is None and not (path and path.strip()):
        raise RowError("image", "image is missing; give every row a path, an address or bytes.")
    return data, path or ""


def locate(path: str, options: SourceOptions) -> str:
    """Where a path of a manifest leads: an absolute local path, `s3://...` or `https://...`.

    Raises RowError("image") if the run does not allow it, or the scheme is another.
    """
    scheme, mark, rest = path.partition("://")
    if mark and scheme.isalnum():
        scheme = scheme.lower()
        if scheme == "s3":
            if re.search("[@:]", rest.partition("/")[0]):
                raise RowError(
                    "image",
                    "image must be s3://bucket/key without user, password or port: credentials and endpoint "
                    "come from the AWS variables or a profile.",
                )
            if not rest.partition("/")[2]:
                raise RowError("image", f"{shown(path)} names no object: give s3://bucket/key.")
            return f"s3://{rest}"
        if scheme != "https":
            raise RowError(
                "image",
                f"{shown(without_query(path))} is of the scheme {scheme}, but only paths, s3:// and "
                "https:// are read: copy it there.",
            )
        if not options.https:
            raise RowError(
                "image",
                f"{shown(without_query(path))} is not read, since the run does not allow https:// "
                "sources: allow them, or copy it.",
            )
        return f"https://{rest}"
    if os.path.isabs(path):
        return path
    if storage.is_s3(options.folder):
        inner = posixpath.normpath(path)
        if inner.startswith("../") or inner == "..":
            if not options.outside:
                raise _leaves(path)
            bucket, _, key = options.folder.removeprefix("s3://").partition("/")
            return f"s3://{bucket}{posixpath.normpath(posixpath.join('/', key, inner))}"
        return storage.join(options.folder, inner)
    place = os.path.join(os.path.abspath(options.folder), path)
    if not options.outside:
        try:
            root = os.path.realpath(options.folder)
            inside = os.path.commonpath([root, os.path.realpath(place)]) == root
        except (ValueError, OSError):
            raise RowError("image", f"{shown(path)} is no valid path: correct it.") from None
        if not inside:
            raise _leaves(path)
    return os.path.normpath(place) if ".." not in path else os.path.realpath(place)


def _leaves(path: str) -> RowError:
    return RowError(
        "image",
        f"{shown(path)} leads out of the manifest's folder, which the run does not allow: give an absolute "
        "path, or allow it.",
    )


class _Outage(Exception):
    """Something did not serve, but may do so later; `final` is what to raise if it never does."""

    def __init__(self, final: InputError):
        super().__init__(str(final))
        self.final = final


_OF_A_FILE = {
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "does not exist",
    errno.EACCES: "may not be read",
    errno.EPERM: "may not be read",
    errno.ELOOP: "is a loop of links",
    errno.ENAMETOOLONG: "is no valid path, since it is too long",
    errno.EILSEQ: "is no valid path",
    errno.EINVAL: "is no valid path",
    errno.ENXIO: "is no regular file",
    errno.ENODEV: "is no regular file",
}


def _read_file(path: str, most: int) -> bytes:
    try:
        # A pipe without a writer would hold an ordinary open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            regular, data = stat.S_ISREG(os.fstat(descriptor).st_mode), b""
            if regular:
                with open(descriptor, "rb", closefd=False) as file:
                    data = file.read(most + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        words = _OF_A_FILE.get(error.errno or 0)
        if words:
            raise RowError("image", f"{shown(path)} {words}: correct the path or the file.") from None
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        message = f"{shown(path)} cannot be read, the system says '{reason}': look after its file system."
        raise _Outage(InputError(message)) from error
    except ValueError:
        raise RowError("image", f"{shown(path)} is no valid path: correct it.") from None
    if not regular:
        raise RowError("image", f"{shown(path)} is no regular file: give one.")
    if len(data) > most:
        raise _too_many_bytes(shown(path), most)
    return data


def _read_object(path: str, most: int) -> bytes:
    try:
        return storage.read_object(path, most)
    except FileNotFoundError:
        raise RowError("image", f"{shown(path)} does not exist: correct the path.") from None
    except storage.TooLarge:
        raise _too_many_bytes(shown(path), most) from None
    except InputError as error:
        if storage.refuses_path(error):
            raise RowError("image", str(error)) from None
        raise _Outage(error) from error
    except ValueError:
        raise RowError("image", f"{shown(path)} is no valid path: correct it.") from None


def _download(url: str, most: int, download: Callable[[str, int], bytes]) -> bytes:
    try:
        return download(url, most)
    except https.Unavailable as error:
        # Of many hosts in a manifest some are always gone, so this is no reason to stop a run.
        name = shown(without_query(url))
        raise _Outage(RowError("image", f"{name} cannot be had, {error}: try again or copy it.")) from error


def _too_many_bytes(name: str, most: int) -> RowError:
    return RowError("image", f"{name} has more than the allowed {most:,} bytes: make it smaller.")


class _Endpoint:
    """How one endpoint has served of late, for all threads that ask it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.failures = 0
        self.since = 0.0
        self.until = 0.0

    def wait(self) -> None:
        """Until the present pause is over."""
        while (rest := self.until - time.monotonic()) > 0:
            time.sleep(rest)

    def served(self) -> None:
        with self.lock:
            self.failures = 0

    def failed(self, started: float, patience: float) -> bool:
        """Begins a pause, twice as long as the last one; False if it would outlast the patience.

        Patience counts from the endpoint's first failure in a row, so that the many sources of a dead
        one are not each waited for, and from `started`, in case only one source fails while others do not.
        """
        with self.lock:
            now = time.monotonic()
            # Who was under way when the pause began brings no news.
            if now >= self.until:
                if not self.failures or now - self.until > patience:
                    self.failures, self.since = 0, now
                pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self.failures, 10))
                self.failures += 1
                self.until = now + pause * random.uniform(0.5, 1)
            return self.until - min(self.since, started) <= patience


@functools.lru_cache(maxsize=4096)
def _endpoint(name: str) -> _Endpoint:
    return _Endpoint()


def _patiently(name: str, attempt: Callable[[], bytes], patience: float) -> bytes:
    """What `attempt` gives, tried again while its endpoint does not serve, for `patience` seconds."""
    endpoint, started = _endpoint(name), time.monotonic()
    while True:
        endpoint.wait()
        try:
            data = attempt()
        except RowError:
            endpoint.served()
            raise
        except _Outage as outage:
            if not endpoint.failed(started, patience):
                raise outage.final from outage
        else:
            endpoint.served()
            return data


# Decoding


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


# For the model, and back


def prepare(image: Image.Image, task: str, config: ModelConfig, name: str = "The source") -> Prepared:
    """An upright RGB picture as the task `edit` or `understand` takes it.

    Raises RowError("image"), whose message begins with `name`, if one side is more than 200 times the
    other.
    """
    least, most = config.edit_pixels if task == "edit" else config.understand_pixels
    try:
        semantic = semantic_image(image, least, most)
    except RowError as error:
        raise RowError(error.kind, f"{name}: {error}") from None
    height, width, _ = semantic.shape
    size = config.bucket(image.height, image.width) if task == "edit" else None
    return Prepared(
        width=image.width,
        height=image.height,
        semantic=semantic,
        grid=(height // FACTOR, width // FACTOR),
        size=size,
        pixels=None if size is None else pixel_image(image, size),
    )


def restore_size(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """An edit's result, uint8 [H, W, 3], at its source's size: uint8 [height, width, 3].

    It is scaled by one factor until it covers that size, and what goes beyond is cut off evenly, so
    nothing is distorted and no border is added. The model was shown the middle of the source, so the
    two agree but for a margin of a few per cent where the table has a size of about the source's ratio,
    and for much more where a source is far longer than any size of the table.
    """
    image = Image.fromarray(pixels)
    scale = max(height / image.height, width / image.width)
    # Cut first: the whole of a picture that covers 20000x100 pixels would be hundreds of megabytes.
    top = max(0.0, (image.height - height / scale) / 2)
    left = max(0.0, (image.width - width / scale) / 2)
    box = (left, top, image.width - left, image.height - top)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
