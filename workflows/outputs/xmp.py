"""Metadata inside picture files: an XMP packet in PNG, JPEG or WebP, without touching the pixels.

The packet is inserted between the parts of a file, which stay unchanged byte for byte. Knows nothing of data
sets, and of pictures only their containers.
"""

import re
import struct
import zlib
from xml.sax.saxutils import escape

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media made by a trained model."""

SYSTEM = "Wallaroo"
NAMESPACE = "urn:x-wallaroo-batch:xmp:1.0:"
"""Namespace of properties that IPTC lacks."""

MAX_PROMPT_BYTES = 50_000
"""Most bytes of the prompt (a JPEG segment has 64 KiB). A longer one is cut and ends with an ellipsis."""

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PNG_KEYWORD = b"XML:com.adobe.xmp"
_JPEG_KEYWORD = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_FLAG, _ALPHA_FLAG = 0x04, 0x10


def xmp_packet(prompt: str, seed: str, model_digest: str) -> bytes:
    """Builds an XMP packet with IPTC's properties of generated pictures.

    They are source type, prompt, system and version. Equal values give equal bytes. Characters that XML
    cannot hold become U+FFFD.

    Args:
        prompt: Prompt of the picture.
        seed: Its seed, which has a property of our own.
        model_digest: Digest of the checkpoint, written as the version of the system.

    Returns:
        The packet in UTF-8.
    """
    properties = {
        "Iptc4xmpExt:DigitalSourceType": DIGITAL_SOURCE_TYPE,
        "Iptc4xmpExt:AISystemUsed": SYSTEM,
        "Iptc4xmpExt:AISystemVersionUsed": model_digest,
        "Iptc4xmpExt:AIPromptInformation": prompt,
        "wallaroo:Seed": seed,
    }
    lines = [f"<{name}>{_xml_text(value)}</{name}>" for name, value in properties.items()]
    return "\n".join(
        [
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>',
            '<x:xmpmeta xmlns:x="adobe:ns:meta/">',
            '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">',
            '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
            f' xmlns:wallaroo="{NAMESPACE}">',
            *lines,
            "</rdf:Description>",
            "</rdf:RDF>",
            "</x:xmpmeta>",
            '<?xpacket end="r"?>',
        ]
    ).encode()


def _xml_text(text: str) -> str:
    text = _NO_XML.sub("\ufffd", text)
    escaped = escape(text, {"\r": "&#13;"})
    while len(escaped.encode()) > MAX_PROMPT_BYTES:
        text = text[: len(text) * 9 // 10]
        escaped = escape(text, {"\r": "&#13;"}) + "…"
    return escaped


def embed(data: bytes, packet: bytes) -> bytes:
    """Puts an XMP packet into an image file. A file that holds this packet stays unchanged.

    Args:
        data: A PNG, JPEG or WebP file without another packet.
        packet: From `xmp_packet`.

    Returns:
        The file with the packet.

    Raises:
        ValueError: The file has none of these formats.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR":
        write = _embed_png
    elif data.startswith(b"\xff\xd8\xff"):
        write = _embed_jpeg
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        write = _embed_webp
    else:
        raise ValueError(f"a file that begins with {data[:16]!r} is neither PNG nor JPEG nor WebP")
    return data if packet in data else write(data, packet)


def _embed_png(data: bytes, packet: bytes) -> bytes:
    """Inserts an international text chunk after the header, so that readers find it before the pixels."""
    header_end = 8 + 12 + 13
    # Not compressed, no language, no translated keyword.
    body = b"iTXt" + _PNG_KEYWORD + b"\0\0\0\0\0" + packet
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:header_end] + chunk + data[header_end:]


def _embed_jpeg(data: bytes, packet: bytes) -> bytes:
    """Inserts a segment APP1 after JFIF and Exif, which must come first."""
    place = 2
    while data[place + 1] in (0xE0, 0xE1):
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    body = _JPEG_KEYWORD + packet
    return data[:place] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[place:]


def _embed_webp(data: bytes, packet: bytes) -> bytes:
    """Appends a chunk and sets its flag in the header; a file without a header gets one."""
    chunks = data[12:]
    kind, body = chunks[:4], chunks[8:]
    if kind == b"VP8X":
        header, chunks = bytearray(body[:10]), chunks[18:]
    else:
        width, height, alpha = _webp_frame(kind, body)
        header = bytearray(struct.pack("<I", _ALPHA_FLAG if alpha else 0))
        header += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    header[0] |= _XMP_FLAG
    padding = b"\0" * (len(packet) % 2)
    xmp = b"XMP " + struct.pack("<I", len(packet)) + packet + padding
    content = b"WEBPVP8X" + struct.pack("<I", len(header)) + header + chunks + xmp
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _webp_frame(kind: bytes, body: bytes) -> tuple[int, int, bool]:
    """Width and height of the frame of a WebP file, and whether it has transparency."""
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF, False
    raise ValueError(f"a WebP file begins with the chunk {kind!r}")
