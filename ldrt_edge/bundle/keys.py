"""Keys: who signed a bundle, and whom this user trusts. Without a network, in PEM files, in one of two ways.

A key pair of our own making is Ed25519, in two files, NAME.key (secret) and NAME.pub; trusting it copies its .pub into
the user's own folder. A key with certificates (`certificates.py`) is trusted through its authority's, NAME.crt. Either
gives the same signature for the same bundle each time, so that bundles can be compared byte for byte.

Source: RFC 8032 (Ed25519), RFC 8410 (its PEM form).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ldrt_edge.bundle import certificates
from ldrt_edge.bundle.container import SIGNATURE_BYTES
from ldrt_edge.bundle.home import trust_folder
from ldrt_edge.errors import ArtifactError, ConfigError

UNSIGNED = b"{}".ljust(SIGNATURE_BYTES - 1) + b"\n"
_CONTEXT = b"ldrt-edge/bundle/2\n"  # so that a signature means a bundle, whatever else the key signs
_KEY_LIMIT_BYTES = 64 << 10
_PEM = serialization.Encoding.PEM
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class Signer:
    """Who signed.

    key: the public key in hex, or the sha256 of the signer's certificate. trusted_as: the name under which this user
    trusts it, or its authority; None: not trusted, `doubt` may say why. subject: whom the certificate is about.
    """

    key: str
    trusted_as: str | None
    subject: str | None = None
    doubt: str = ""

    @property
    def told(self) -> str:
        """In a line, for a person."""
        who = self.key if self.subject is None else f"{self.subject} (certificate {self.key})"
        return f"{self.trusted_as}, {who}" if self.trusted_as else f"a key that you do not trust, {who}{self.doubt}"


def keygen(name: Path, passphrase: str | None = None) -> tuple[Path, Path]:
    """Make a key pair; returns its two files, the secret one first, which only its owner can read.

    Raises:
        ConfigError: a file of that name exists, or cannot be written.
    """
    secret = Ed25519PrivateKey.generate()
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        how = serialization.BestAvailableEncryption(passphrase.encode())
    pem = secret.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, how)
    paths = name.with_name(f"{name.name}.key"), name.with_name(f"{name.name}.pub")
    _write_new(paths[0], pem, 0o600)
    _write_new(paths[1], _public_pem(secret.public_key()), 0o644)
    return paths


def is_encrypted(path: Path) -> bool:
    """Whether a secret key wants a passphrase."""
    return b"ENCRYPTED" in _read(path)


def sign(raw: bytes, path: Path, passphrase: str | None = None, chain: Path | None = None) -> bytes:
    """The signature of a statement's bytes by the secret key in `path`, as it stands in a bundle.

    chain: the key's certificate and those between it and its authority, in PEM; None: an Ed25519 key of `keygen`.

    Raises:
        ConfigError: no such key, a wrong passphrase, another kind of key, or certificates that nobody would accept.
    """
    try:
        secret = serialization.load_pem_private_key(_read(path), passphrase.encode() if passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: no secret key that can be read, or a wrong passphrase") from error
    if chain is not None:
        if not isinstance(secret, certificates.SigningKey):
            raise ConfigError(f"{path}: a key with a certificate is one of an elliptic curve, or RSA")
        try:
            certified = x509.load_pem_x509_certificates(_read(chain))
            value = certificates.sign(_CONTEXT + raw, secret, certified)
            return _written(certificates.as_fields(certified, value))
        except ValueError as error:
            raise ConfigError(f"{chain}: {error}") from error
    if not isinstance(secret, Ed25519PrivateKey):
        raise ConfigError(f"{path}: not an Ed25519 key: make one with ldrt-edge bundle keygen, or add --certificate")
    return _written({"key": _hex(secret.public_key()), "signature": secret.sign(_CONTEXT + raw).hex()})


def signer_of(raw: bytes, signature: bytes) -> Signer | None:
    """Who signed a statement's bytes; None where nobody did.

    Raises:
        ArtifactError: the signature is not one of these bytes.
    """
    if signature == UNSIGNED:
        return None
    try:
        fields = json.loads(signature)
        value, certified = bytes.fromhex(fields["signature"]), "certificates" in fields
        if certified:
            chain = certificates.read_chain(fields["certificates"])
            certificates.check_signature(_CONTEXT + raw, value, chain[0])
            again = _written(certificates.as_fields(chain, value))
        else:
            key = bytes.fromhex(fields["key"])
            Ed25519PublicKey.from_public_bytes(key).verify(value, _CONTEXT + raw)
            again = _written({"key": key.hex(), "signature": value.hex()})
        if signature != again:
            raise ValueError("not as a signature is written")
        return _certified(chain) if certified else Signer(key.hex(), trusted().get(key.hex()))
    except (ValueError, KeyError, TypeError, RecursionError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ArtifactError("the signature is not that of this bundle: it was changed after it was signed") from error


def _certified(chain: list[x509.Certificate]) -> Signer:
    known = trusted_authorities()
    authority, doubt = certificates.authority_of(chain, known.values(), datetime.now(UTC))
    named = next((name for name, certificate in known.items() if certificate == authority), None)
    told = f": {doubt}" if doubt else ""
    return Signer(certificates.fingerprint_of(chain[0]), named, certificates.subject_of(chain[0]), told)


def trust(path: Path) -> Signer:
    """Trust a public key, or an authority and all whom it lets sign code, from now on; by the name of its file.

    Raises:
        ConfigError: neither of them, or another is trusted under this name.
    """
    content, label = _read(path), path.stem
    if not _LABEL.fullmatch(label):
        raise ConfigError(f"{path}: rename the file: its name stands for the key, in plain letters and digits")
    if b"-----BEGIN CERTIFICATE-----" in content:
        certificate = _load_authority(path)
        key, suffix, pem = certificates.fingerprint_of(certificate), ".crt", certificate.public_bytes(_PEM)
        known = {certificates.fingerprint_of(each): name for name, each in trusted_authorities().items()}
        subject: str | None = certificates.subject_of(certificate)
    else:
        public = _load_public(path)
        key, suffix, pem, known, subject = _hex(public), ".pub", _public_pem(public), trusted(), None
    held = trust_folder() / f"{known.get(key, label)}{suffix}"
    if key not in known:
        if any(held.with_suffix(other).exists() for other in (".pub", ".crt")):
            raise ConfigError(f"another key is trusted as {label!r} already: rename {path.name}, or remove {held}")
        trust_folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_new(held, pem, 0o644)
    return Signer(key, held.stem, subject)


def trusted_file(signer: Signer) -> Path:
    """The file in the user's folder that makes a signer trusted."""
    return trust_folder() / f"{signer.trusted_as}{'.crt' if signer.subject is not None else '.pub'}"


def trusted_authorities() -> dict[str, x509.Certificate]:
    """The authorities that this user trusts, by name.

    Raises:
        ConfigError: a file among them is none.
    """
    return {path.stem: _load_authority(path) for path in sorted(trust_folder().glob("*.crt"))}


def trusted() -> dict[str, str]:
    """The keys that this user trusts: hex of the key to its name.

    Raises:
        ConfigError: a file among them is no public key.
    """
    return {_hex(_load_public(path)): path.stem for path in sorted(trust_folder().glob("*.pub"))}


def _written(fields: Mapping[str, object]) -> bytes:
    content = json.dumps(fields).encode()
    if len(content) >= SIGNATURE_BYTES:
        raise ValueError("too many certificates, or too large ones")
    return content.ljust(SIGNATURE_BYTES - 1) + b"\n"


def _load_authority(path: Path) -> x509.Certificate:
    try:
        [certificate] = x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path}: not one certificate that can be read") from error
    if not certificates.is_authority(certificate):
        raise ConfigError(f"{path}: not the certificate of an authority, which may issue others")
    return certificate


def _load_public(path: Path) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: no public key that can be read") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: not an Ed25519 key")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_KEY_LIMIT_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
