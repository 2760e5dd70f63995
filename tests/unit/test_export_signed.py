"""Content Credentials: read back by the library's own reader, and broken by a changed pixel."""

import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import c2pa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from tests.documents import ROOT, blocks
from wallaroo.jobs.cli import main
from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.content_credentials import ASSERTION, CredentialSigner
from wallaroo.workflows.datasets.export import export
from wallaroo.workflows.options import OptionError
from wallaroo.workflows.outputs import shards
from wallaroo.workflows.outputs.rows import encode_image
from wallaroo.workflows.outputs.xmp import DIGITAL_SOURCE_TYPE
from wallaroo.workflows.reports.finish import finish

MIME_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
UNTRUSTED = ["signingCredential.untrusted"]


def write_signer(folder, key=None, name="signer", usages=(ExtendedKeyUsageOID.EMAIL_PROTECTION,), **options):
    """Certificate and key, self-signed; options: `authority`, `days` from now, and `encrypted` of the key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )
    first, last = options.get("days", (-1, 30))
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=first))
        .not_valid_after(now + timedelta(days=last))
        .add_extension(x509.BasicConstraints(options.get("authority", False), None), True)
        .add_extension(x509.KeyUsage(True, *[False] * 8), True)
    )
    if options.get("identifier", True):
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
        made = made.add_extension(identifier, False)
    if usages:
        made = made.add_extension(x509.ExtendedKeyUsage(usages), False)
    hashed = None if isinstance(key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)) else hashes.SHA256()
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = serialization.BestAvailableEncryption(b"x") if options.get("encrypted") else plain
    form = serialization.PrivateFormat.PKCS8
    if options.get("traditional"):
        form = serialization.PrivateFormat.TraditionalOpenSSL
    paths = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    Path(paths[0]).write_bytes(made.sign(key, hashed).public_bytes(encoding))
    Path(paths[1]).write_bytes(key.private_bytes(encoding, form, secret))
    return paths


@pytest.fixture
def signer(tmp_path):
    return write_signer(tmp_path)


def read(data, suffix):
    """State, codes of what is wrong, the active manifest, and how many manifests there are."""
    with c2pa.Reader(MIME_TYPES[suffix], io.BytesIO(data)) as reader:
        document = json.loads(reader.json())
        faults = [one["code"] for one in document.get("validation_status", [])]
        active = document["manifests"][document["active_manifest"]]
        return reader.get_validation_state(), faults, active, len(document["manifests"])


def assertions(manifest):
    return {one["label"]: one["data"] for one in manifest["assertions"]}


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png_chunks(data):
    place = 8
    while place < len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        place += 12 + size


def jpeg_segments(data):
    """Segments before the first scan, markers included, and the rest."""
    place, found = 2, []
    while data[place + 1] != 0xDA:
        size = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        found.append(data[place : place + size])
        place += size
    return found, data[place:]


def with_pixels_of(signed, other, suffix):
    """A whole file with the credentials of one file and the pixels of another of the same size and format."""
    if suffix == ".png":
        body = [b"".join(data for kind, data in png_chunks(other) if kind == b"IDAT")]
        chunks, done = [], False
        for kind, data in png_chunks(signed):
            if kind == b"IDAT":
                data, done = (b"" if done else body[0]), True
            chunks.append(
                struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            )
        return signed[:8] + b"".join(chunks)
    segments, _ = jpeg_segments(signed)
    _, scan = jpeg_segments(other)
    return signed[:2] + b"".join(segments) + scan


# Files that are signed


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_signed_picture_reads_back_valid_and_a_changed_pixel_does_not(signer, suffix):
    rng = np.random.default_rng(3)
    # Smooth, so that JPEG's tables are the same for both.
    image = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3), np.uint8), 16, 0), 16, 1)
    changed = image.copy()
    changed[40, 40] ^= 128
    form = {".png": "png", ".jpg": "jpeg", ".webp": "webp"}[suffix]
    data, other = encode_image(image, form)[0], encode_image(changed, form)[0]
    signed = CredentialSigner(*signer).sign(data, MIME_TYPES[suffix], "a", {"model_digest": "m" * 64})
    assert (pixels(signed) == pixels(data)).all()
    state, faults, manifest, count = read(signed, suffix)
    assert (state, faults, count) == ("Valid", UNTRUSTED, 1)
    agent = {"name": "Wallaroo", "version": "m" * 64}
    assert assertions(manifest)["c2pa.actions.v2"]["actions"] == [
        {"action": "c2pa.created", "digitalSourceType": DIGITAL_SOURCE_TYPE, "softwareAgent": agent}
    ]
    if suffix == ".webp":
        at = signed.index(b"VP8L") + 40
        broken = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]
    else:
        broken = with_pixels_of(signed, other, suffix)
        assert (pixels(broken) == pixels(other)).all() and (pixels(broken) != pixels(signed)).any()
    state, faults, _, _ = read(broken, suffix)
    assert state == "Invalid" and "assertion.dataHash.mismatch" in faults


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-256", "P-384", "P-521", "Ed25519", "RSA"],
)
def test_every_kind_of_key_signs(tmp_path, key):
    data = encode_image(np.zeros((16, 16, 3), np.uint8), "png")[0]
    made = CredentialSigner(*write_signer(tmp_path, key)).sign(data, "image/png", "a.png", {})
    assert read(made, ".png")[:2] == ("Valid", UNTRUSTED)


def test_a_key_in_the_form_of_openssl_ec_signs(tmp_path):
    paths = write_signer(tmp_path, traditional=True)
    assert "BEGIN EC PRIVATE KEY" in Path(paths[1]).read_text()
    CredentialSigner(*paths)


# Exports


def made(outputs, folder, task="generate"):
    if task == "generate":
        plan = outputs.make_output(folder, [outputs.plan_table(errors=(1,))])
    else:
        plan = outputs.make_task_output(folder, task, rows=4, failed=(1,))
    finish(str(folder), plan)


def replace_digest(output, before, after):
    """Lets an output say that its rows were edited from other bytes."""
    table = pq.read_table(output / "data")
    digests = [hashlib.sha256(data).hexdigest() for data in (before, after)]
    rows = table.to_pylist()
    for row in rows:
        if row["source"]["sha256"] == digests[0]:
            row["source"]["sha256"] = digests[1]
    shards.write_shard(str(output), 0, pa.Table.from_pylist(rows, schema=table.schema))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_bytes().splitlines()]


def test_credentials_name_model_and_run(outputs, tmp_path, signer):
    made(outputs, tmp_path / "out")
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", c2pa=signer)
    assert (summary.exported, summary.errors, summary.unread) == (5, 1, 0)
    export(str(tmp_path / "out"), str(tmp_path / "plain"), "files")
    plain = {line["file_name"]: line for line in lines_of(tmp_path / "plain")}
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    for line in lines_of(tmp_path / "dest"):
        data = (tmp_path / "dest" / line["file_name"]).read_bytes()
        assert line["sha256"] == hashlib.sha256(data).hexdigest() != plain[line["file_name"]]["sha256"]
        assert (pixels(data) == pixels((tmp_path / "plain" / line["file_name"]).read_bytes())).all()
        state, faults, manifest, _ = read(data, ".png")
        assert (state, faults, manifest["title"]) == ("Valid", UNTRUSTED, line["file_name"])
        said = assertions(manifest)[ASSERTION]
        assert said["model_digest"] == "m" * 64 and said["config_digest"] == run["config_digest"]
        assert (said["task"], said["seed"]) == ("generate", str(line["seed"]))
        assert said["sha256"] == plain[line["file_name"]]["sha256"] and "source_sha256" not in said
        assert "a cat" not in json.dumps(manifest)


def test_an_edit_opens_its_source_with_the_credentials_that_it_has(outputs, tmp_path, signer):
    made(outputs, tmp_path / "out", "edit")
    # One source has credentials of its own, since somebody signed it before.
    source = tmp_path / "sources" / "s1.png"
    before = source.read_bytes()
    signed = CredentialSigner(*signer).sign(before, "image/png", "s1.png", {})
    source.write_bytes(signed)
    replace_digest(tmp_path / "out", before, signed)
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", c2pa=signer)
    assert (summary.exported, summary.unread) == (3, 0)
    for line in lines_of(tmp_path / "dest"):
        state, faults, manifest, count = read((tmp_path / "dest" / line["file_name"]).read_bytes(), ".png")
        assert (state, faults) == ("Valid", UNTRUSTED)
        assert count == (2 if line["id"] == "p1" else 1)
        (parent,) = manifest["ingredients"]
        assert (parent["relationship"], parent["title"]) == ("parentOf", f"s{line['id'][1:]}.png")
        assert ("active_manifest" in parent) == (line["id"] == "p1")
        opened, edited = assertions(manifest)["c2pa.actions.v2"]["actions"]
        assert opened["action"] == "c2pa.opened" and len(opened["parameters"]["ingredients"]) == 1
        assert (edited["action"], edited["digitalSourceType"]) == ("c2pa.edited", DIGITAL_SOURCE_TYPE)
        assert assertions(manifest)[ASSERTION]["source_sha256"] == line["source_sha256"]


def test_sources_that_are_gone_or_changed_are_named_and_counted(outputs, tmp_path, signer, capsys):
    made(outputs, tmp_path / "out", "edit")
    (tmp_path / "sources" / "s0.png").unlink()
    (tmp_path / "sources" / "s1.png").write_bytes(encode_image(np.zeros((9, 9, 3), np.uint8), "png")[0])
    with pytest.raises(SystemExit) as left:
        main(["export", "files", str(tmp_path / "out"), str(tmp_path / "dest"), "--c2pa", *signer])
    assert left.value.code == 3  # a row is an error
    assert "3 sources named by digest alone, since they have changed" in capsys.readouterr().out
    for line in lines_of(tmp_path / "dest"):
        state, faults, manifest, count = read((tmp_path / "dest" / line["file_name"]).read_bytes(), ".png")
        assert (state, faults, count) == ("Valid", UNTRUSTED, 1)
        assert manifest["ingredients"][0]["title"] == f"s{line['id'][1:]}.png"
        assert assertions(manifest)[ASSERTION]["source_sha256"] == line["source_sha256"]


def test_a_source_that_the_library_cannot_parse_is_named(signer):
    picture = encode_image(np.zeros((16, 16, 3), np.uint8), "png")[0]
    cut = picture[:45]
    with Image.open(io.BytesIO(cut)) as image:
        assert image.format == "PNG"
    signed = CredentialSigner(*signer).sign(picture, "image/png", "a.png", {}, ("cut.png", cut))
    state, faults, manifest, _ = read(signed, ".png")
    assert (state, faults) == ("Valid", UNTRUSTED) and manifest["ingredients"][0]["title"] == "cut.png"


def test_a_damaged_picture_is_named(signer):
    with pytest.raises(InputError, match=r"a\.png cannot be signed \(.*\): verify the output"):
        CredentialSigner(*signer).sign(b"junk", "image/png", "a.png", {})


def test_a_second_export_keeps_what_the_first_signed(outputs, tmp_path, signer):
    made(outputs, tmp_path / "out")
    output, dest = str(tmp_path / "out"), tmp_path / "dest"
    export(output, str(dest), "files", c2pa=signer)
    first = {path.name: path.read_bytes() for path in dest.iterdir()}
    again = export(output, str(dest), "files", c2pa=signer)
    assert again.unchanged == again.files == 6
    assert {path.name: path.read_bytes() for path in dest.iterdir()} == first
    # An interrupted one lacks pictures and the list, which comes last.
    (dest / "p1@0.png").unlink()
    (dest / "metadata.jsonl").unlink()
    assert export(output, str(dest), "files", c2pa=signer).unchanged == 4
    assert (dest / "p0@0.png").read_bytes() == first["p0@0.png"]
    # Neither a broken file nor one of somebody else is taken for our own.
    data = first["p2@0.png"]
    (dest / "p2@0.png").write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    other = write_signer(tmp_path, name="other")
    for certificate in (signer, other):
        with pytest.raises(InputError, match=r"exists with other content .* --overwrite"):
            export(output, str(dest), "files", c2pa=certificate)
    export(output, str(dest), "files", c2pa=other, overwrite=True)
    for path in dest.glob("*.png"):
        state, faults, manifest, _ = read(path.read_bytes(), ".png")
        assert (state, faults) == ("Valid", UNTRUSTED)
        assert manifest["signature_info"]["common_name"] == "other"


def test_metadata_is_signed_too(outputs, tmp_path, signer):
    made(outputs, tmp_path / "out")
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", embed_metadata=True, c2pa=signer)
    for line in lines_of(tmp_path / "dest"):
        data = (tmp_path / "dest" / line["file_name"]).read_bytes()
        assert read(data, ".png")[:2] == ("Valid", UNTRUSTED)
        with Image.open(io.BytesIO(data)) as image:
            assert DIGITAL_SOURCE_TYPE in image.info["xmp"].decode()


# The page


def test_the_commands_of_the_page_make_a_signer(outputs, tmp_path, monkeypatch, capsys):
    shell = [block.text for block in blocks(ROOT / "docs" / "provenance.md") if "openssl" in block.text]
    assert len(shell) == 1
    subprocess.run(["bash", "-euc", shell[0]], cwd=tmp_path, check=True, capture_output=True)
    made(outputs, tmp_path / "out" / "first")
    monkeypatch.chdir(tmp_path)
    told = [
        line
        for block in blocks(ROOT / "docs" / "provenance.md")
        for line in block.text.splitlines()
        if line.startswith("wallaroo export") and "--c2pa" in line
    ]
    assert len(told) == 1
    with pytest.raises(SystemExit) as left:
        main(told[0].split()[1:])
    assert left.value.code == 3, capsys.readouterr().err  # of the error row
    assert read((tmp_path / "signed" / "p0@0.png").read_bytes(), ".png")[:2] == ("Valid", UNTRUSTED)


# Refusals


def of(folder, **options):
    return write_signer(folder, **options)


BAD = {
    "no PEM certificate": (lambda f, c, k: (c + "x", k), r"the certificate .* cannot be read \(No such file"),
    "no key": (lambda f, c, k: (c, k + "x"), r"the key .* cannot be read \(No such file"),
    "not a certificate": (lambda f, c, k: (k, k), "holds no PEM certificate"),
    "not a key": (lambda f, c, k: (c, c), "holds no PEM private key"),
    "another key": (lambda f, c, k: (c, of(f, name="b")[1]), "is not that of the first certificate"),
    "encrypted": (lambda f, c, k: of(f, encrypted=True), r"is encrypted: .* openssl pkey -in"),
    "expired": (lambda f, c, k: of(f, days=(-9, -2)), "is valid from .* but not today"),
    "not yet": (lambda f, c, k: of(f, days=(2, 9)), "is valid from .* but not today"),
    "an authority": (lambda f, c, k: of(f, authority=True), "refuses the certificate .* not of an authority"),
    "no identifier": (lambda f, c, k: of(f, identifier=False), "refuses .* an authority key identifier"),
    "no usage": (lambda f, c, k: of(f, usages=()), "refuses the certificate .* extended key usage"),
    "of the web": (
        lambda f, c, k: of(f, usages=(ExtendedKeyUsageOID.SERVER_AUTH,)),
        "refuses the certificate .* emailProtection",
    ),
    "curve": (lambda f, c, k: of(f, key=ec.generate_private_key(ec.SECP256K1())), "of a kind that C2PA"),
    "dsa": (lambda f, c, k: of(f, key=dsa.generate_private_key(2048)), "of a kind that C2PA"),
    "ed448": (lambda f, c, k: of(f, key=ed448.Ed448PrivateKey.generate()), "of a kind that C2PA"),
    "short": (lambda f, c, k: of(f, key=rsa.generate_private_key(65537, 1024)), "RSA key of at least 2048"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_sign_is_refused_before_anything_is_written(outputs, tmp_path, signer, capsys, case):
    make, words = BAD[case]
    made(outputs, tmp_path / "out")
    words_of = ["export", "files", str(tmp_path / "out"), str(tmp_path / "dest"), "--c2pa"]
    with pytest.raises(SystemExit) as left:
        main([*words_of, *make(tmp_path, *signer)])
    said = capsys.readouterr().err
    assert left.value.code == 1 and re.search(words, said.replace("\n", " ")), said
    assert said.rstrip().endswith(".") and "Traceback" not in said
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("package", ["c2pa", "cryptography"])
def test_a_missing_package_names_the_extra(outputs, tmp_path, signer, monkeypatch, package):
    made(outputs, tmp_path / "out")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"--c2pa needs {package}.*pip install 'wallaroo-batch\[c2pa\]'"):
        export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", c2pa=signer)
    assert not (tmp_path / "dest").exists()


def test_other_formats_are_not_signed():
    with pytest.raises(OptionError, match="c2pa is for the format files, but format is 'webdataset'"):
        export("out", "dest", "webdataset", c2pa=("a", "b"))
