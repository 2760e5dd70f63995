"""Source pictures: where they may come from, what is made of every kind of file, and what is refused."""

import base64
import functools
import http.server
import io
import os
import re
import ssl
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.pictures import base, real_pictures, save, write_pictures
from wallaroo.actors.rows import requests
from wallaroo.model.checkpoint import TINY, load_config, load_tokenizer
from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.errors import RowError
from wallaroo.workflows.outputs.rows import RunConstants, restore_size
from wallaroo.workflows.plans.rows import plan_rows
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.runs.requests import load_requests
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.sources import decode as sources_decode
from wallaroo.workflows.sources import fetch as sources_fetch
from wallaroo.workflows.sources import https
from wallaroo.workflows.sources.decode import decode
from wallaroo.workflows.sources.fetch import Fetched, fetch, fetch_many
from wallaroo.workflows.sources.prepare import load_many, prepare
from wallaroo.workflows.sources.references import SourceOptions, identity, kept_uri, locate, parts_of

PUBLISHED = ModelConfig()


@pytest.fixture(autouse=True)
def no_memories():
    """What one test's endpoints did, none is to pause for."""
    sources_fetch._endpoint.cache_clear()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def check_refused(error, name, reason):
    """A message about a source: of the one kind, one line, its name, what is wrong."""
    assert error.kind == "image"
    message = str(error)
    assert re.search(reason, message), message
    assert name in message
    assert message.isprintable() and len(message) < 500 and message.endswith(".")


# Decoding


def test_every_kind_of_file_gives_the_picture_or_the_reason(pictures):
    config = load_config(TINY)
    references = [str(picture.path) for picture in pictures]
    good = 0
    for (position,), made in load_many(references, "edit", config, SourceOptions("/")):
        picture = pictures[position]
        if picture.reason:
            assert isinstance(made, RowError), picture.path
            check_refused(made, str(picture.path), picture.reason)
            continue
        assert not isinstance(made, RowError), made
        good += 1
        assert made.uri == str(picture.path)
        data = picture.path.read_bytes()
        assert made.sha256 == Fetched("", data).sha256
        image = decode(data)
        assert image.mode == "RGB"
        pixels = np.array(image)
        assert pixels.shape == picture.pixels.shape, picture.path
        difference = np.abs(pixels.astype(int) - picture.pixels).mean()
        assert difference <= picture.tolerance, picture.path
        assert (made.prepared.height, made.prepared.width) == pixels.shape[:2]
    assert good > 45


def test_real_pictures_are_prepared_for_both_tasks():
    paths = real_pictures()
    assert len(paths) >= 30
    config = load_config(TINY)
    for task in ("edit", "understand"):
        seen = 0
        for (position,), made in load_many([str(path) for path in paths], task, config, SourceOptions("/")):
            assert not isinstance(made, RowError), made
            with Image.open(paths[position]) as image:
                assert (made.prepared.width, made.prepared.height) == image.size
            seen += 1
        assert seen == len(paths)


def test_a_bomb_is_refused_by_its_header(pictures):
    data = next(picture.path for picture in pictures if picture.path.name == "small-bomb.png").read_bytes()
    with pytest.raises(RowError, match="9000x9000 pixels"):
        decode(data[:2000])
    assert decode(data, most_pixels=9000 * 9000).size == (9000, 9000)


def test_a_small_file_with_endless_work_is_stopped():
    data = save(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    flood = data[:-2] + scan * (2_000_000 // len(scan)) + data[-2:]
    with pytest.raises(RowError, match=r"more than the allowed 0\.2 seconds"):
        decode(flood, seconds=0.2)
    assert decode(data, seconds=30).size == (3000, 3000)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_file_is_a_picture_or_a_row_error(data):
    image = Image.fromarray(base()[:40, :60])
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]))
    content = bytearray(_small(form, image.tobytes()))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert decode(content, "it").mode == "RGB"
    except RowError as error:
        check_refused(error, "it", "")


@functools.cache
def _small(form, pixels):
    options = {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}
    if form == "TIFF":
        options = {"compression": "tiff_lzw"}
    return save(
        Image.frombytes("RGB", (60, 40), pixels), form, **(options if form not in ("GIF", "BMP") else {})
    )


# For the model, and back


def test_prepared_arrays_are_those_of_the_two_paths():
    image = Image.fromarray(base())
    edit = prepare(image, "edit", PUBLISHED)
    assert edit.size == PUBLISHED.bucket(200, 300) == Size(416, 608)
    assert edit.pixels.shape == (416, 608, 3) and edit.pixels.dtype == np.uint8
    assert edit.semantic.shape == (28 * edit.grid[0], 28 * edit.grid[1], 3)
    assert edit.semantic.dtype == np.uint8
    assert edit.grid == (7, 11)  # the multiples of 28 that are nearest to 200 and 300
    understand = prepare(image, "understand", PUBLISHED)
    assert understand.size is None and understand.pixels is None
    np.testing.assert_array_equal(understand.semantic, edit.semantic)


def test_extreme_pictures_are_prepared_up_to_a_ratio_of_200():
    one = prepare(Image.new("RGB", (1, 1), "red"), "edit", PUBLISHED)
    assert one.semantic.shape == (112, 112, 3) and one.size == Size(512, 512)
    assert (one.pixels == [255, 0, 0]).all()
    long = prepare(Image.new("RGB", (2000, 10), "red"), "edit", PUBLISHED)
    assert long.size == Size(352, 704) and (long.pixels == [255, 0, 0]).all()
    with pytest.raises(RowError, match=r"^x\.png: .*2010x10.*200 times"):
        prepare(Image.new("RGB", (2010, 10)), "understand", PUBLISHED, "x.png")


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from([(64, 64), (32, 64), (64, 48)]),
)
@settings(deadline=None)
def test_a_restored_picture_has_the_size_of_its_source(source, size):
    pixels = np.full((*size, 3), 77, np.uint8)
    restored = restore_size(pixels, *source)
    assert restored.shape == (*source, 3) and restored.dtype == np.uint8
    assert (restored == 77).all()


def test_restoring_cuts_evenly_and_distorts_nothing():
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 31.5) ** 2 + (columns - 31.5) ** 2 < 20**2
    pixels = np.repeat(disc[:, :, None] * np.uint8(255), 3, 2)
    restored = restore_size(pixels, 100, 200)[:, :, 0] > 127
    # 64 columns became 200, so the radius of 20 pixels is 62.5, of which 50 fit above and below the middle.
    assert restored[50].sum() == pytest.approx(125, abs=2)
    assert restored[:, 100].all()
    np.testing.assert_array_equal(restored, restored[::-1, ::-1])
    np.testing.assert_array_equal(restore_size(pixels, 64, 64), pixels)


# References


def test_bytes_and_structs_need_no_file(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"cat")
    options = SourceOptions(str(tmp_path))
    assert fetch(b"raw", options) == Fetched("", b"raw")
    assert fetch({"bytes": b"raw", "path": "dog.png"}, options) == Fetched("dog.png", b"raw")
    found = Fetched(str(tmp_path / "cat.png"), b"cat")
    for reference in ("cat.png", "./cat.png", str(tmp_path / "cat.png"), {"bytes": None, "path": "cat.png"}):
        assert fetch(reference, options) == found
    for reference in (None, "", " ", {}, {"bytes": None, "path": None}):
        with pytest.raises(RowError, match="image is missing"):
            fetch(reference, options)
    for reference in (7, {"bytes": "text", "path": "x"}, {"path": 3}):
        with pytest.raises(RowError, match="is of type"):
            fetch(reference, options)


@pytest.mark.parametrize(
    ("folder", "path", "place"),
    [
        ("/m", "a.png", "/m/a.png"),
        ("/m", "b/../a.png", "/m/a.png"),
        ("/m", "/etc/a.png", "/etc/a.png"),
        ("/m", "s3://bucket/a/../b", "s3://bucket/a/../b"),
        ("/m", "S3://bucket/a", "s3://bucket/a"),
        ("s3://b/m", "a/b.png", "s3://b/m/a/b.png"),
        ("s3://b/m/", "./x/../a.png", "s3://b/m/a.png"),
        ("s3://b/m", "/etc/a.png", "/etc/a.png"),
        ("/m", "HTTPS://host/a", "https://host/a"),
        ("/m", "file:///etc/a%20b.png", "/etc/a b.png"),
        ("/m", "FILE://localhost/etc/a.png", "/etc/a.png"),
        ("s3://b/m", "file:/etc/a.png", "/etc/a.png"),
        ("/m", "DATA:image/png;base64,AAAA", "data:image/png;base64,AAAA"),
        ("/m", "data.png", "/m/data.png"),
        ("/m", "9j/" + "A" * 80, "/m/9j/" + "A" * 80),
        ("/m", "/9j/" + "A" * 30, "/9j/" + "A" * 30),
    ],
)
def test_a_reference_leads_to_one_place(folder, path, place):
    assert locate(path, SourceOptions(folder, https=True)) == place


@pytest.mark.parametrize(
    ("folder", "path", "reason"),
    [
        ("/m", "../a.png", "leads out of the manifest's folder"),
        ("/m", "a/../../b.png", "leads out of the manifest's folder"),
        ("/m", "..", "leads out of the manifest's folder"),
        ("s3://b/m", "../a.png", "leads out of the manifest's folder"),
        ("s3://b/m", "a/../../../other/b", "leads out of the manifest's folder"),
        ("/m", "a\0b", "not a valid path"),
        ("/m", "https://host/a", "does not allow https"),
        ("/m", "http://host/a", "scheme http"),
        ("/m", "ftp://user:hunter2@host/a", "scheme ftp"),
        ("/m", "file://other/etc/passwd", "another host"),
        ("/m", "file://user:hunter2@other/a", "another host"),
        ("/m", "gs://bucket/a", "scheme gs, but only paths, file://, s3://, https:// and data: are read"),
        ("/m", "hf://datasets/a/b.png", "scheme hf"),
        ("/m", "az://bucket/a", "scheme az"),
        ("/m", "data:image/png;base64," + "A" * (16 << 20), "16,777,238 characters"),
        ("/m", "s3://bucket", "names no object"),
    ],
)
def test_other_references_are_refused(folder, path, reason):
    with pytest.raises(RowError, match=reason) as caught:
        locate(path, SourceOptions(folder))
    check_refused(caught.value, "", reason)
    assert "hunter2" not in str(caught.value)


def check_inline(reference, data, uri, options):
    """A reference that holds the picture gives its bytes, and no copy of them in its name."""
    place = locate(parts_of(reference)[1], options)
    for one in (reference, place):
        assert fetch(one, options) == Fetched(uri, data)
        assert len(str(identity(one))) < 5000
    assert kept_uri(place) == uri
    ((positions, made),) = load_many([place], "understand", load_config(TINY), options)
    assert positions == [0] and (made.uri, made.sha256) == (uri, Fetched("", data).sha256)


@pytest.mark.parametrize("folder", ["/m", "s3://bucket/m"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_picture_may_stand_in_the_text_of_a_row(form, folder):
    data = save(Image.fromarray(base()[:40, :60]), form)
    text, options = base64.b64encode(data).decode(), SourceOptions(folder)
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for one in (text, lines, text.rstrip("="), base64.urlsafe_b64encode(data).decode(), f"{text}\n"):
        check_inline(one, data, "data:", options)
        check_inline(f"data:image/x;charset=utf-8;base64,{one}", data, "data:image/x", options)
        check_inline({"bytes": None, "path": one}, data, "data:", options)
        check_inline({"bytes": one, "path": None}, data, "data:", options)
    quoted = "".join(f"%{byte:02X}" for byte in data)
    check_inline(f"Data:image/x,{quoted}", data, "data:image/x", options)
    check_inline(
        f"data:image/x;base64,{text.replace('=', '%3D').replace('+', '%2B')}", data, "data:image/x", options
    )


def test_broken_and_too_long_texts_of_pictures_are_refused():
    text = base64.b64encode(save(Image.fromarray(base()[:40, :60]), "PNG")).decode()
    options = SourceOptions("/m")
    for reference, reason in (
        ("data:image/png;base64", "no data after a comma"),
        ("data:", "no data after a comma"),
        (f"data:image/png;base64,{text[:-5]}!{text[-4:]}", "broken base64"),
        (f"data:image/png;base64,{text}é", "broken base64"),
        ("data:image/png;base64,A", "broken base64"),
    ):
        with pytest.raises(RowError) as caught:
            fetch(reference, options)
        check_refused(caught.value, "", reason)
    with pytest.raises(RowError, match="The image in the manifest has more than the allowed 1,000 bytes"):
        fetch(text, SourceOptions("/m", most_bytes=1000))
    for reference, reason in (
        ("data:text/html,<html>", "HTML"),
        ("data:image/png;base64,", "empty"),
        ("data:image/svg+xml,%3Csvg/%3E", "HTML or XML"),
        (text[:400], "is truncated|damaged"),
    ):
        ((_, made),) = load_many([reference], "understand", load_config(TINY), options)
        check_refused(made, "The image in the manifest", reason)


def test_a_plan_keeps_the_text_of_a_picture_and_its_results_do_not():
    data = save(Image.fromarray(base()[:40, :60]), "JPEG")
    text = base64.b64encode(data).decode()
    texts = [text, f"data:image/jpeg;base64,{text}", "data:image/png"]
    table = pa.table({"image": texts, "prompt": ["what?"] * 3})
    asked = PlanSettings.of(RunConfig("", "", "understand"))
    rows = plan_rows(table, asked, load_config(TINY), load_tokenizer(TINY), folder="/m").to_pylist()
    assert [row["status"] for row in rows] == ["planned", "planned", "error"]
    check_refused(RowError(rows[2]["error_type"], rows[2]["error_message"]), "data:image/png", "no data")
    found = [fetch(row["source"]["uri"], SourceOptions("/m")) for row in rows[:2]]
    assert [one.data for one in found] == [data, data]
    assert [one.uri for one in found] == ["data:", "data:image/jpeg"]

    broken = f"data:image/png;base64,{text[:60]}"
    table = pa.table({"image": [*texts[:2], broken], "prompt": ["what?"] * 3})
    plan = plan_rows(table, asked, load_config(TINY), load_tokenizer(TINY), folder="/m")
    run = RunConstants("understand", "m" * 64, "c" * 64)
    loaded, requests = load_requests(plan, str(TINY), run, SourceOptions("/m"))
    assert len(requests) == 2
    uris = [source["uri"] for source in loaded.column("source").to_pylist()]
    assert uris == ["data:", "data:image/jpeg", "data:image/png"]
    assert loaded.column("error_type").to_pylist() == ["", "", "image"]


def test_a_picture_is_seen_within_the_limits_of_the_run(tmp_path):
    Image.fromarray(base()).resize((300, 200)).save(tmp_path / "cat.png")
    table = pa.table({"image": ["cat.png"], "prompt": ["what?"]})
    asked = PlanSettings.of(RunConfig("", "", "understand"))
    plan = plan_rows(table, asked, load_config(TINY), load_tokenizer(TINY), folder=str(tmp_path))
    found = {}
    for limits in ((None, None), (None, 6272), (50176, 100352), (784, 784 * 200)):
        run = RunConstants("understand", "m" * 64, "c" * 64, min_pixels=limits[0], max_pixels=limits[1])
        _, made = load_requests(plan, str(TINY), run, SourceOptions("/"))
        (request,) = requests(made, ["row"])
        assert request.prompt.semantic[1] - request.prompt.semantic[0] == request.semantic[..., 0].size // 784
        found[limits] = request.semantic.shape[:2]
    # By the checkpoint 3,136 to 12,544 pixels.
    assert found == {
        (None, None): (84, 112),
        (None, 6272): (56, 84),
        (50176, 100352): (196, 308),
        (784, 784 * 200): (196, 308),
    }


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG_large", "png", ""])
def test_a_picture_is_known_by_its_content_not_by_its_suffix(tmp_path, suffix):
    (tmp_path / f"cat.{suffix}").write_bytes(save(Image.fromarray(base()), "JPEG", quality=95))
    ((_, made),) = load_many([f"cat.{suffix}"], "edit", load_config(TINY), SourceOptions(str(tmp_path)))
    assert (made.prepared.height, made.prepared.width) == base().shape[:2]


def test_pictures_of_telephones_are_read_upright_where_the_extra_is_installed():
    pytest.importorskip("pillow_heif")
    assert sources_decode._has_heif()
    image = Image.fromarray(base())
    found = np.array(decode(save(image, "HEIF", quality=-1)))
    assert np.abs(found.astype(int) - base()).mean() <= 2
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.array(decode(save(image, "HEIF", quality=-1, exif=exif.tobytes())))
    assert turned.shape[:2] == base().shape[1::-1]
    assert np.abs(turned.astype(int) - np.rot90(base(), -1)).mean() <= 2
    with pytest.raises(RowError, match="more than the allowed 100 pixels"):
        decode(save(image, "HEIF"), most_pixels=100)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_pictures_of_telephones_are_named_where_it_is_not(monkeypatch, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    sources_decode._has_heif.cache_clear()
    try:
        with pytest.raises(RowError) as caught:
            decode(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(100), "cat.heic")
        check_refused(caught.value, "cat.heic", r"HEIC or HEIF image: install wallaroo-batch\[heif\]")
    finally:
        sources_decode._has_heif.cache_clear()


def test_a_relative_path_leaves_the_folder_only_if_allowed(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "out.png").write_bytes(b"out")
    (tmp_path / "m" / "link.png").symlink_to("../out.png")
    (tmp_path / "m" / "folder").symlink_to("..")
    (tmp_path / "m" / "in.png").write_bytes(b"in")
    (tmp_path / "m" / "inner.png").symlink_to("in.png")
    (tmp_path / "same").symlink_to("m")
    options = SourceOptions(str(tmp_path / "same"))
    assert fetch("inner.png", options).data == b"in"
    for path in ("link.png", "folder/out.png", "../out.png"):
        with pytest.raises(RowError, match="leads out"):
            fetch(path, options)
        assert fetch(path, SourceOptions(str(tmp_path / "m"), outside=True)).data == b"out"
    # An absolute path says what it means.
    assert fetch(str(tmp_path / "m" / "link.png"), options).data == b"out"
    assert locate("../../a", SourceOptions("s3://b/x/y", outside=True)) == "s3://b/a"


def test_only_regular_files_that_are_there_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "long.png").write_bytes(bytes(1001))
    options = SourceOptions(str(tmp_path), most_bytes=1000)
    for path, reason in (
        ("pipe.png", "not a regular file"),
        (".", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("absent.png", "does not exist"),
        ("long.png/x", "does not exist"),
        ("loop.png", "loop of links"),
        ("x" * 300, "too long"),
        ("long.png", "more than the allowed 1,000 bytes"),
        ("\ud800.png", "not a valid path"),
    ):
        with pytest.raises(RowError) as caught:
            fetch(path, options)
        check_refused(caught.value, "", reason)
    with pytest.raises(RowError, match="The image in the manifest has more than the allowed"):
        fetch(bytes(1001), options)


@pytest.mark.parametrize("path", [r"images\a.png", r"C:\images\a.png", r"\\host\share\a.png", "C:/a.png"])
def test_paths_of_windows_are_told_how_they_are_written(tmp_path, path):
    with pytest.raises(RowError, match=r"does not exist: write / in place of \\, and no drive\.$"):
        fetch(path, SourceOptions(str(tmp_path)))
    # A file may have such a name.
    (tmp_path / r"images\a.png").write_bytes(b"x")
    assert fetch(r"images\a.png", SourceOptions(str(tmp_path))).data == b"x"


def test_each_source_of_a_shard_is_fetched_once_and_a_bad_one_harms_no_other(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    references = ["b", "a", "missing", "b", b"raw", {"bytes": None, "path": "c"}, "a", b"raw", "missing"]
    found = list(fetch_many(references, SourceOptions(str(tmp_path), fetches=2)))
    assert [positions for positions, _ in found] == [[0, 3], [1, 6], [2, 8], [4, 7], [5]]
    values = [one if isinstance(one, RowError) else one.data for _, one in found]
    assert values[:2] == [b"b", b"a"] and values[3:] == [b"raw", b"c"]
    check_refused(values[2], str(tmp_path / "missing"), "does not exist")
    assert list(fetch_many([], SourceOptions("/"))) == []


def test_sources_wait_in_a_bounded_number(tmp_path):
    """The generator is asked for one; no more than `fetches` others are fetched meanwhile."""
    begun = []

    class Watched(dict):
        def get(self, key, default=None):
            begun.append(self["bytes"])
            return super().get(key, default)

    references = [Watched(bytes=b"%d" % number, path="") for number in range(50)]
    arriving = fetch_many(references, SourceOptions("/", fetches=3))
    next(arriving)
    time.sleep(0.2)
    # Each is looked at twice to tell it from others, and twice when it is fetched.
    fetched = {number for number in range(50) if begun.count(b"%d" % number) > 2}
    assert 0 in fetched and fetched <= {0, 1, 2}
    arriving.close()


# https


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
        *("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "2002:a9fe:a9fe::"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "fec0::1", "no address"),
    ],
)
def test_private_loopback_link_local_and_metadata_addresses_are_not_public(address):
    assert not https.is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101"])
def test_public_addresses_are(address):
    assert https.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/a",
        "https://2130706433/a",
        "https://0x7f.1/a",
        "https://[::1]/a",
        "https://[::ffff:10.0.0.1]/a",
        "https://169.254.169.254/latest/meta-data",
        "https://localhost/a",
    ],
)
def test_an_address_in_an_url_is_looked_at_as_the_system_reads_it(url):
    with pytest.raises(RowError, match="not a public address"):
        fetch(url, SourceOptions("/", https=True))


def test_a_name_with_one_private_address_is_refused():
    resolved = {"good.example": ["1.1.1.1"], "mixed.example": ["1.1.1.1", "10.0.0.1"], "none.example": []}
    for host in ("mixed.example", "none.example"):
        with pytest.raises(RowError, match=f"leads to {host}, which is not a public address"):
            https.download(f"https://{host}/a", 10, resolve=lambda host, port: resolved[host])


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https:///a", "names no host"),
        ("https://user:hunter2@good.example/a?signature=hunter2", "user or password"),
        ("https://good.example:99999/a?signature=hunter2", "not a valid address"),
        ("https://[::1/a", "not a valid address"),
        ("https://" + "x" * 70 + ".example/", "not a valid address"),
        ("https://good.example/\ud800", "not a valid address"),
    ],
)
def test_broken_urls_are_refused_and_secrets_in_them_not_repeated(url, reason):
    with pytest.raises(RowError, match=reason) as caught:
        fetch(url, SourceOptions("/", https=True))
    assert "hunter2" not in str(caught.value)


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers by the path: /status/CODE, /redirect/N, /to/HOST, /bytes/N, /unsized/N, /cut, /slow."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        _, kind, *rest = self.path.partition("?")[0].split("/")
        if kind == "redirect":
            left = int(rest[0])
            self.answer(302, Location=f"/redirect/{left - 1}" if left else "/bytes/3")
        elif kind == "to":
            self.answer(302, Location=f"{rest[0]}://{rest[1]}/bytes/3")
        elif kind == "bytes":
            self.answer(200, b"x" * int(rest[0]))
        elif kind == "flaky":
            busy = self.server.asked.count(self.path) <= int(rest[0])
            self.answer(503 if busy else 200, b"at last")
        elif kind == "status":
            self.answer(int(rest[0]))
        else:
            self.close_connection = True
            self.send_response(200)
            if kind in ("cut", "slow"):
                self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * (int(rest[0]) if kind == "unsized" else 50))
            if kind in ("slow", "unsized-slow"):
                self.wfile.flush()
                self.server.done.wait(30)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A web server with TLS on loopback, which a download may ask where a test says so."""
    certificate(tmp_path / "cert.pem", "good.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    https._tls.cache_clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    server.asked, server.done = [], threading.Event()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()
    thread.join()
    https._tls.cache_clear()


def certificate(path, *names):
    """A key and a certificate that it signs itself, good for an hour."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, plain)
        + made.public_bytes(serialization.Encoding.PEM)
    )


def ask(host, path, most=1000, name="good.example", **options):
    """Downloads from the test's server, the one private address that is permitted."""
    resolved = {"good.example": ["1.2.3.4", "127.0.0.1"], "other.example": ["127.0.0.1"]}
    permitted = options.pop("permitted", lambda address: address in ("127.0.0.1", "1.2.3.4"))
    resolve = lambda name, port: [one for one in resolved.get(name, ["10.0.0.1"]) if one != "1.2.3.4"]  # noqa: E731
    url = f"https://{name}:{host.server_port}{path}"
    return https.download(url, most, resolve=resolve, permitted=permitted, **options)


def test_a_download_follows_redirects_within_bounds(host):
    assert ask(host, "/bytes/1000?a=1&b=%20 c") == b"x" * 1000
    assert host.asked == ["/bytes/1000?a=1&b=%20%20c"]
    assert ask(host, "/unsized/1000") == b"x" * 1000
    assert ask(host, "/redirect/4") == b"xxx"
    with pytest.raises(RowError, match="redirects more than 5 times"):
        ask(host, "/redirect/5")


def test_every_redirect_is_looked_at(host):
    with pytest.raises(RowError, match=r"leads to inner\.example, which is not a public address"):
        ask(host, "/to/https/inner.example")
    with pytest.raises(RowError, match="leads to http://"):
        ask(host, "/to/http/good.example")
    with pytest.raises(RowError, match="leads to file://"):
        ask(host, "/to/file/etc")
    assert len(host.asked) == 3


def test_a_connection_goes_to_an_address_that_was_looked_at(host):
    """Whatever the name leads to a moment later."""
    with pytest.raises(RowError, match="not a public address"):
        ask(host, "/bytes/3", permitted=https.is_public)
    assert host.asked == []


def test_sizes_statuses_and_certificates_are_the_sources_own_fault(host):
    for path, reason in (
        ("/bytes/1001?signature=hunter2", "more than the allowed 1,000 bytes"),
        ("/unsized/1001", "more than the allowed 1,000 bytes"),
        ("/status/404", "status 404"),
        ("/status/403?signature=hunter2", "status 403"),
        ("/status/204", "status 204"),
        ("/status/304", "status 304"),
    ):
        with pytest.raises(RowError) as caught:
            ask(host, path)
        check_refused(
            caught.value, f"https://good.example:{host.server_port}{path.partition('?')[0]}", reason
        )
        assert "hunter2" not in str(caught.value)
    with pytest.raises(RowError, match=r"certificate of other\.example is not valid"):
        ask(host, "/bytes/3", name="other.example")


def test_what_may_work_later_is_not_the_sources_fault(host):
    for path, reason in (
        ("/status/503", "status 503"),
        ("/status/429", "status 429"),
        ("/cut", "does not send all of it"),
        ("/slow", "took too long"),
        ("/unsized-slow", "took too long"),
    ):
        with pytest.raises(https.Unavailable, match=f"good.example.* {reason}"):
            ask(host, path, seconds=1 if "slow" in path else 120)


def test_a_host_is_asked_again_until_patience_ends(host, monkeypatch):
    now = [100.0]

    def sleep(seconds):
        now[0] += seconds

    # Only pauses take time of this clock.
    monkeypatch.setattr(sources_fetch, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(sources_fetch, "FIRST_PAUSE_SECONDS", 0.05)

    def download(url, most):
        return ask(host, url.removeprefix("https://good.example"), most)

    options = SourceOptions("/", https=True, retry_seconds=30)
    found = fetch("https://good.example/flaky/3?key=hunter2", options, download)
    assert found == Fetched("https://good.example/flaky/3", b"at last")
    assert len(host.asked) == 4
    options = SourceOptions("/", https=True, retry_seconds=1)
    with pytest.raises(RowError, match=r"/status/500 cannot be read, good.example answers with status 500"):
        fetch("https://good.example/status/500?key=hunter2", options, download)
    asked = len(host.asked)
    assert asked > 5
    # Patience with a host is not spent anew on each of its pictures.
    with pytest.raises(RowError, match="cannot be read"):
        fetch("https://good.example/status/502", options, download)
    assert len(host.asked) == asked + 1


def test_names_in_messages_are_short_and_printable():
    assert https.shown("a\n\x1b[31m.png") == "a\\n\\x1b[31m.png"
    long = https.shown("x" * 5000 + ".png")
    assert len(long) == 200 and long.endswith(".png")


def test_saving_helpers_write_what_they_say(pictures):
    """A file meant to be good that another reader refuses would prove nothing."""
    for picture in pictures:
        if not picture.reason:
            with Image.open(io.BytesIO(picture.path.read_bytes())) as image:
                image.load()
