"""Content Credentials: a signed statement in a picture's file of how it was made, by c2pa-python.

The statement (a C2PA manifest) names the model, the run and, for an edit, the source; a changed byte of the
file breaks it. Needs the extra `c2pa`. Knows nothing of data sets and of the places that files lie in.
"""

import importlib.metadata
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from wallaroo.model.errors import InputError
from wallaroo.workflows.outputs.rows import encode_image
from wallaroo.workflows.outputs.xmp import DIGITAL_SOURCE_TYPE, SYSTEM

if TYPE_CHECKING:
    from cryptography import x509

ASSERTION = "wallaroo-batch.generation"
"""Label of the assertion with model, run and seed, which C2PA has no term for."""

MAX_SOURCE_NAME = 200
"""Characters of a source's name in the credentials."""

_SETTINGS = {
    # A picture beside a picture of the same size would double the file.
    "builder": {"thumbnail": {"enabled": False}},
    # Sources come from anywhere; nothing in them may cause a request.
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_MIN_RSA_BITS = 2048
_PARENT = "source"


class CredentialSigner:
    """Signs pictures with one certificate and key, which are checked before the first picture."""

    def __init__(self, certificate: str, key: str):
        """Reads and tries certificate and key.

        Args:
            certificate: Path of a PEM file: the signer's certificate, then those that lead to a root.
            key: Path of a PEM file with its private key, not encrypted: P-256, P-384, P-521, Ed25519, or RSA
                of at least 2,048 bits.

        Raises:
            InputError: The extra `c2pa` is not installed; a file cannot be read, or holds something else; the
                certificate is out of date, is not that of the key, or is of a kind that C2PA does not allow.
        """
        try:
            import c2pa
            import cryptography  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--c2pa needs {error.name}, which is not installed: pip install 'wallaroo-batch[c2pa]'."
            ) from None
        self._c2pa = c2pa
        chain = _read_certificates(certificate)
        algorithm, secret = _read_key(key, certificate, chain[0])
        self._serial = str(chain[0].serial_number)
        self._context = c2pa.Context.from_dict(_SETTINGS)
        try:
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, _pem(chain), secret, None))
            picture = encode_image(np.zeros((16, 16, 3), np.uint8), "png")[0]
            self._signed(picture, "image/png", "trial.png", {}, None)
        except c2pa.C2paError as error:
            raise InputError(
                f"c2pa-python refuses the certificate {certificate} ({_reason(error)}): it must be version 3 "
                f"and not of an authority, and have an authority key identifier, the key usage "
                f"digitalSignature and an extended key usage such as emailProtection."
            ) from error

    def sign(
        self,
        data: bytes,
        mime_type: str,
        title: str,
        facts: Mapping[str, Any],
        source: tuple[str, bytes | None] | None = None,
    ) -> bytes:
        """The file with credentials in it; its pixels stay.

        Args:
            data: A PNG, JPEG or WebP file.
            mime_type: Its type.
            title: Its name.
            facts: Plain JSON values: what the credentials say of model and run. `model_digest` stands for the
                version of the model.
            source: For an edit, name and bytes of the picture it started from. Credentials within these bytes
                stay part of the new ones; without bytes the source is only named.

        Returns:
            The bytes of the new file.

        Raises:
            InputError: The library refuses the picture.
        """
        try:
            try:
                return self._signed(data, mime_type, title, facts, source)
            except self._c2pa.C2paError:
                if source is None or source[1] is None:
                    raise
                # Pillow reads what the parsers of c2pa-python refuse.
                return self._signed(data, mime_type, title, facts, (source[0], None))
        except self._c2pa.C2paError as error:
            raise InputError(f"{title} cannot be signed ({_reason(error)}): verify the output.") from error

    def _signed(
        self,
        data: bytes,
        mime_type: str,
        title: str,
        facts: Mapping[str, Any],
        source: tuple[str, bytes | None] | None,
    ) -> bytes:
        agent = {"name": SYSTEM, "version": facts.get("model_digest", "")}
        made: dict[str, Any] = {"digitalSourceType": DIGITAL_SOURCE_TYPE, "softwareAgent": agent}
        actions: list[dict[str, Any]] = [{"action": "c2pa.created", **made}]
        manifest: dict[str, Any] = {}
        if source is not None:
            # Whatever begins with another picture says first that it opened it.
            opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT]}}
            actions = [opened, {"action": "c2pa.edited", **made}]
            parent = {"title": source[0][-MAX_SOURCE_NAME:], "relationship": "parentOf", "label": _PARENT}
            kind = _mime_type(source[1]) if source[1] is not None else None
            if kind is None:
                manifest["ingredients"] = [parent]
        manifest |= {
            "claim_generator_info": [{"name": "Wallaroo Batch", "version": _version()}],
            "title": title,
            "format": mime_type,
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": actions}},
                {"label": ASSERTION, "data": dict(facts)},
            ],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(manifest, self._context) as builder:
            if source is not None and source[1] is not None and kind is not None:
                builder.add_ingredient(parent, kind, io.BytesIO(source[1]))
            builder.sign(self._signer, mime_type, io.BytesIO(data), signed)
        return signed.getvalue()

    def has_signed(self, data: bytes, mime_type: str, facts: Mapping[str, Any]) -> bool:
        """Whether a file has valid credentials of this certificate that state these facts.

        Signatures differ each time, so an export cannot compare bytes to recognise its own file.

        Args:
            data: The picture file.
            mime_type: Type of the file, such as `image/png`.
            facts: The facts that the credentials must state.

        Returns:
            True if they do; False if there are none, they are invalid or they state other facts.
        """
        try:
            with self._c2pa.Reader(mime_type, io.BytesIO(data), context=self._context) as reader:
                manifest, state = reader.get_active_manifest(), reader.get_validation_state()
        except self._c2pa.C2paError:
            return False
        if manifest is None or state not in ("Valid", "Trusted"):
            return False
        said = [one["data"] for one in manifest.get("assertions", ()) if one["label"] == ASSERTION]
        serial = manifest.get("signature_info", {}).get("cert_serial_number")
        return said == [json.loads(json.dumps(facts))] and serial == self._serial


def _read_file(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(
            f"the {what} {path} cannot be read ({error.strerror}): give a local PEM file."
        ) from error


def _read_certificates(path: str) -> list["x509.Certificate"]:
    """The certificates of a PEM file. The first must be valid today."""
    from cryptography import x509

    data = _read_file(path, "certificate")
    try:
        chain = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise InputError(
            f"{path} holds no PEM certificate: give the signer's certificate and those of its authorities."
        ) from None
    now, first, last = datetime.now(UTC), chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    if not first <= now <= last:
        raise InputError(
            f"the certificate {path} is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, but not today: "
            f"give a current one."
        )
    return chain


def _read_key(path: str, certificate: str, signer: "x509.Certificate") -> tuple[str, bytes]:
    """C2PA's name of the algorithm of a private key, and the key as the library wants it.

    Args:
        path: Of the key.
        certificate: Path of the certificate, for errors.
        signer: The certificate, whose key it must be.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    data = _read_file(path, "key")
    try:
        key = serialization.load_pem_private_key(data, None)
    except TypeError:
        raise InputError(
            f"the key {path} is encrypted: write it without a password, by openssl pkey -in {path} -out NEW."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{path} holds no PEM private key: give the key of the certificate.") from None
    algorithm = _algorithm(key)
    if algorithm is None:
        raise InputError(
            f"the key {path} is of a kind that C2PA does not allow: make one on the curve P-256, P-384 or "
            f"P-521, an Ed25519 key, or an RSA key of at least {_MIN_RSA_BITS} bits."
        )
    encoding, form = serialization.Encoding, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(encoding.DER, form) != signer.public_key().public_bytes(
        encoding.DER, form
    ):
        raise InputError(
            f"the key {path} is not that of the first certificate in {certificate}: give the certificate of "
            f"the key, and put it before those of its authorities."
        )
    plain = serialization.NoEncryption()
    return algorithm, key.private_bytes(encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _algorithm(key: Any) -> str | None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return _CURVES.get(key.curve.name)
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _MIN_RSA_BITS:
        return "ps256"
    return None


def _pem(chain: list["x509.Certificate"]) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return b"".join(one.public_bytes(Encoding.PEM) for one in chain)


def _mime_type(data: bytes) -> str | None:
    """The type of a picture file; None if Pillow does not know it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.get_format_mimetype()
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _version() -> str:
    try:
        return importlib.metadata.version("wallaroo-batch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _reason(error: Exception) -> str:
    """The library's message, without the kind of error before it."""
    return str(error).partition(": ")[2].strip() or type(error).__name__
