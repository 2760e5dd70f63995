"""Colour profiles: pictures of other colour spaces come out as the sRGB values that colorimetry says."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.pictures import base, png, real_pictures, save
from wallaroo.model.errors import RowError
from wallaroo.workflows.sources.decode import MAX_PROFILE_BYTES, NOTE, decode

ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""Linear RGB -> XYZ of D50, as the tags of these profiles have them."""
D50 = np.array([0.9642, 1.0, 0.8249])
ADOBE_GAMMA = 563 / 256


def profile(space, pcs, tags, kind=b"mntr"):
    """An ICC profile, version 2.1."""
    texts = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + _xyz(D50),
    }
    table, data = b"", b""
    start = 128 + 4 + 12 * len(texts | tags)
    for name, body in (texts | tags).items():
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02100000, kind, space, pcs)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)
    header += bytes(128 - len(header))
    return header + struct.pack(">I", len(texts | tags)) + table + data


def _xyz(values):
    return struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(matrix, gamma):
    tags = {name: b"XYZ \0\0\0\0" + _xyz(matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return profile(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def grey_profile(gamma):
    return profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile(labs):
    """A press whose 16 corners have these Lab values, a dict of the inks at 0 or 1 to Lab."""
    body = (
        b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    )
    ramp = bytes(range(256))
    body += 4 * ramp
    for corner in np.ndindex(2, 2, 2, 2):
        lightness, a, b = labs(corner)
        body += bytes((round(lightness * 2.55), round(a + 128), round(b + 128)))
    return profile(b"CMYK", b"Lab ", {b"A2B0": body + 3 * ramp}, kind=b"prtr")


def srgb_of_xyz(xyz):
    """XYZ of D50, [..., 3] -> sRGB levels, as floats."""
    linear = np.clip(xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_of_lab(lightness, a, b):
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    return srgb_of_xyz(D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)))


def decoded(image, form="PNG", **options):
    return np.array(decode(save(image, form, **options))).astype(float)


def patches():
    """Colours within all of the gamuts, uint8 [8, 8, 3]."""
    return np.random.default_rng(0).integers(70, 186, (8, 8, 3), np.uint8)


@pytest.mark.parametrize(("matrix", "gamma"), [(ADOBE_RGB, ADOBE_GAMMA), (DISPLAY_P3, 2.2), (SRGB, 1.8)])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_colours_are_converted_to_srgb(matrix, gamma, form):
    pixels = patches()
    icc = rgb_profile(matrix, gamma)
    options = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    found = decoded(Image.fromarray(pixels), form, icc_profile=icc, **options.get(form, {}))
    expected = srgb_of_xyz((pixels / 255) ** (round(gamma * 256) / 256) @ matrix.T)
    assert np.abs(expected - pixels).max() > 8
    difference = np.abs(found - expected)
    # AVIF loses a level or two, which weigh more in dark colours.
    assert difference.mean() <= 2 if form == "AVIF" else difference.max() <= 1.6


def test_a_saturated_green_of_adobe_rgb_is_the_strongest_of_srgb():
    pixels = np.full((8, 8, 3), (0, 255, 0), np.uint8)
    found = decoded(Image.fromarray(pixels), icc_profile=rgb_profile(ADOBE_RGB, ADOBE_GAMMA))
    assert np.abs(found - (0, 255, 0)).max() <= 1
    red = np.full((8, 8, 3), (200, 30, 40), np.uint8)
    found = decoded(Image.fromarray(red), icc_profile=rgb_profile(ADOBE_RGB, ADOBE_GAMMA))
    # More than the 200 that the file has.
    assert found[0, 0, 0] > 225


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "I;16", "PA"])
def test_every_mode_is_converted_and_transparency_is_kept(mode):
    grey = mode in ("L", "LA", "I;16")
    icc = grey_profile(1.0) if grey else rgb_profile(ADOBE_RGB, ADOBE_GAMMA)
    colour = np.array([120, 120, 120] if grey else [150, 90, 110])
    linear = colour / 255 if grey else (colour / 255) ** ADOBE_GAMMA
    expected = srgb_of_xyz(linear[0] * D50 if grey else linear @ ADOBE_RGB.T)
    image = Image.new("RGB", (8, 8), tuple(colour.tolist()))
    if mode == "P":
        image = image.quantize(4)
    elif mode == "PA":
        image = image.quantize(4)
        image.info["transparency"] = bytes([255] * 256)
    elif mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 120 * 257, np.uint16))
    else:
        image = image.convert(mode)
    options = {"transparency": image.info["transparency"]} if mode == "PA" else {}
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.repeat(np.uint8([255, 255, 0, 0] * 2)[None], 8, 0)))
    found = decoded(image, icc_profile=icc, **options)
    assert np.abs(found[:, :2] - expected).max() <= 1.6
    if mode in ("RGBA", "LA"):
        assert (found[:, 2:4] == 255).all()


def test_cmyk_with_a_profile_has_the_colours_of_its_press():
    def labs(corner):
        cyan, magenta, yellow, black = corner
        return 95 - 20 * cyan - 30 * magenta - 5 * yellow - 38 * black, 20 * magenta - 30 * cyan, 40 * yellow

    icc = cmyk_profile(labs)
    # Compensation of the black point moves colours by up to 4 levels, since the darkest one has L 2.
    for ink in ((255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)):
        expected = srgb_of_lab(*labs([one / 255 for one in ink]))
        for form, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
            found = decoded(Image.new("CMYK", (16, 16), ink), form, icc_profile=icc, **options)
            assert np.abs(found - expected).max() <= 6, (ink, form, found[0, 0], expected)
    # Paper is white, and the darkest colour is black.
    assert (decoded(Image.new("CMYK", (16, 16)), "TIFF", icc_profile=icc) == 255).all()
    assert (decoded(Image.new("CMYK", (16, 16), (255,) * 4), "TIFF", icc_profile=icc) == 0).all()
    plain = decoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF")
    assert (plain[0, 0] == (0, 255, 255)).all()


def test_a_picture_that_is_srgb_already_keeps_its_bytes():
    image = Image.fromarray(base())
    for icc in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), None):
        options = {"icc_profile": icc} if icc else {}
        np.testing.assert_array_equal(decoded(image, **options), base())
    for path in real_pictures():
        with Image.open(path) as one:
            if one.mode == "RGB" and not one.info.get("icc_profile"):
                np.testing.assert_array_equal(np.array(decode(path.read_bytes())), np.array(one))


P3_CHROMATICITY = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_CHROMATICITY = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunks", "note"),
    [
        ({"gAMA": struct.pack(">I", 100_000)}, "its gamma of 1 (PNG chunk gAMA) was ignored"),
        ({"gAMA": struct.pack(">I", 55_556)}, "its gamma of 0.55556 (PNG chunk gAMA) was ignored"),
        ({"cHRM": struct.pack(">8I", *P3_CHROMATICITY)}, "its colour space (PNG chunk cHRM) was ignored"),
        ({"cICP": bytes((12, 13, 0, 1))}, "its colour space (PNG chunk cICP) was ignored"),
        ({"cICP": bytes((9, 16, 0, 1))}, "its colour space (PNG chunk cICP) was ignored"),
        ({"gAMA": struct.pack(">I", 45_455), "cHRM": struct.pack(">8I", *SRGB_CHROMATICITY)}, ""),
        ({"cICP": bytes((1, 13, 0, 1)), "gAMA": struct.pack(">I", 100_000)}, ""),
        ({"sRGB": b"\0", "gAMA": struct.pack(">I", 100_000)}, ""),
        ({"gAMA": bytes(4)}, ""),
        ({}, ""),
    ],
)
def test_colour_spaces_of_png_are_ignored_with_a_note(chunks, note):
    pixels = patches()
    found = decode(png(pixels.astype(np.uint16) * 257, 2, **chunks))
    assert found.info.get(NOTE, "") == note
    np.testing.assert_array_equal(np.array(found), pixels)


def test_a_profile_precedes_other_colour_spaces_of_png():
    data = save(Image.fromarray(patches()), "PNG", icc_profile=rgb_profile(ADOBE_RGB, ADOBE_GAMMA))
    # After the header, of 33 bytes.
    chunk = png(np.zeros((1, 1, 3)), 2, gAMA=struct.pack(">I", 100_000))[33 : 33 + 16]
    found = decode(data[:33] + chunk + data[33:])
    assert NOTE not in found.info
    np.testing.assert_array_equal(np.array(found), np.array(decode(data)))


@pytest.mark.parametrize(
    "icc",
    [
        b"nonsense",
        rgb_profile(ADOBE_RGB, ADOBE_GAMMA)[:200],
        bytes(3000),
        grey_profile(1.0),
        rgb_profile(ADOBE_RGB, ADOBE_GAMMA) + bytes(MAX_PROFILE_BYTES),
    ],
)
def test_a_profile_that_is_broken_or_of_other_channels_is_ignored(icc):
    pixels = patches()
    data = save(Image.fromarray(pixels), "TIFF", icc_profile=icc)
    found = decode(data)
    np.testing.assert_array_equal(np.array(found), pixels)
    kind = "for GRAY images" if icc == grey_profile(1.0) else "broken"
    if len(icc) > MAX_PROFILE_BYTES:
        kind = "more than 8 MiB"
    assert found.info[NOTE].startswith("its colour profile") and kind in found.info[NOTE]


def test_a_profile_that_is_used_or_absent_is_not_noted():
    image = Image.fromarray(patches())
    for icc in (None, rgb_profile(ADOBE_RGB, ADOBE_GAMMA)):
        assert NOTE not in decode(save(image, "TIFF", **({"icc_profile": icc} if icc else {}))).info
    # A grey picture is taken for one of the colours of its profile.
    assert NOTE not in decode(save(image.convert("L"), "TIFF", icc_profile=icc)).info
    turned = Image.Exif()
    turned[0x0112] = 6
    found = decode(save(image.convert("RGBA"), "PNG", icc_profile=b"broken", exif=turned))
    assert "broken" in found.info[NOTE] and list(found.info) == [NOTE]


def test_a_profile_of_more_than_one_mebibyte_is_used_in_png_too():
    icc = rgb_profile(ADOBE_RGB, ADOBE_GAMMA)
    padded = icc + np.random.default_rng(0).bytes(2 << 20)
    pixels = patches()
    np.testing.assert_array_equal(
        decoded(Image.fromarray(pixels), icc_profile=padded),
        decoded(Image.fromarray(pixels), icc_profile=icc),
    )


def test_any_damage_to_a_profile_leaves_a_picture():
    icc = cmyk_profile(lambda corner: (95 - 20 * sum(corner), 0, 0))
    random = np.random.default_rng(1)
    image = Image.new("CMYK", (8, 8), (10, 20, 30, 40))
    for _ in range(200):
        broken = bytearray(icc)
        for place in random.integers(0, len(icc), 4):
            broken[place] = random.integers(0, 256)
        try:
            assert decode(save(image, "TIFF", icc_profile=bytes(broken))).mode == "RGB"
        except RowError as error:
            raise AssertionError(str(error)) from error


def test_the_picture_in_memory_is_not_changed_by_a_profile_of_another():
    """Transforms are kept between pictures; the one of a profile is no other's."""
    pixels = patches()
    first = decoded(Image.fromarray(pixels), icc_profile=rgb_profile(ADOBE_RGB, ADOBE_GAMMA))
    second = decoded(Image.fromarray(pixels), icc_profile=rgb_profile(DISPLAY_P3, 2.2))
    again = decoded(Image.fromarray(pixels), icc_profile=rgb_profile(ADOBE_RGB, ADOBE_GAMMA))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 2
