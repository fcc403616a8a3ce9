"""Keys: who signed a bundle, and whom this user trusts. Ed25519, in PEM files, without a network.

A key pair is two files, NAME.key (secret) and NAME.pub. Trusting a key copies its .pub into the user's own folder. The
cryptography package signs and verifies; Ed25519 gives the same signature for the same bundle each time, so that bundles
can be compared byte for byte.

Source: RFC 8032 (Ed25519), RFC 8410 (its PEM form).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ldrt_edge.bundle.container import SIGNATURE_BYTES
from ldrt_edge.bundle.home import home
from ldrt_edge.errors import ArtifactError, ConfigError

UNSIGNED = b"{}".ljust(SIGNATURE_BYTES - 1) + b"\n"
_CONTEXT = b"ldrt-edge/bundle/1\n"  # so that a signature means a bundle, whatever else the key signs
_KEY_LIMIT_BYTES = 64 << 10
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class Signer:
    """Who signed: the public key in hex, and the name under which this user trusts it (None: not trusted)."""

    key: str
    trusted_as: str | None


def keygen(name: Path, passphrase: str | None = None) -> tuple[Path, Path]:
    """Make a key pair; returns its two files, the secret one first, which only its owner can read.

    Raises:
        ConfigError: a file of that name exists, or cannot be written.
    """
    secret = Ed25519PrivateKey.generate()
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        how = serialization.BestAvailableEncryption(passphrase.encode())
    pem = secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    paths = name.with_name(f"{name.name}.key"), name.with_name(f"{name.name}.pub")
    _write_new(paths[0], pem, 0o600)
    _write_new(paths[1], _public_pem(secret.public_key()), 0o644)
    return paths


def is_encrypted(path: Path) -> bool:
    """Whether a secret key wants a passphrase."""
    return b"ENCRYPTED" in _read(path)


def sign(raw: bytes, path: Path, passphrase: str | None = None) -> bytes:
    """The signature of a statement's bytes by the secret key in `path`, as it stands in a bundle.

    Raises:
        ConfigError: no such key, a wrong passphrase, or another kind of key.
    """
    try:
        secret = serialization.load_pem_private_key(_read(path), passphrase.encode() if passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: no secret key that can be read, or a wrong passphrase") from error
    if not isinstance(secret, Ed25519PrivateKey):
        raise ConfigError(f"{path}: not an Ed25519 key: make one with ldrt-edge bundle keygen")
    return _written(_hex(secret.public_key()), secret.sign(_CONTEXT + raw).hex())


def signer_of(raw: bytes, signature: bytes) -> Signer | None:
    """Who signed a statement's bytes; None where nobody did.

    Raises:
        ArtifactError: the signature is not one of these bytes.
    """
    if signature == UNSIGNED:
        return None
    try:
        fields = json.loads(signature)
        key, value = bytes.fromhex(fields["key"]), bytes.fromhex(fields["signature"])
        if signature != _written(key.hex(), value.hex()):
            raise ValueError("not as a signature is written")
        Ed25519PublicKey.from_public_bytes(key).verify(value, _CONTEXT + raw)
    except (ValueError, KeyError, TypeError, RecursionError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ArtifactError("the signature is not that of this bundle: it was changed after it was signed") from error
    return Signer(key.hex(), trusted().get(key.hex()))


def trust(path: Path) -> Signer:
    """Trust a public key from now on, under the name of its file.

    Raises:
        ConfigError: no public key, or another key is trusted under this name.
    """
    key, label = _load_public(path), path.stem
    if not _LABEL.fullmatch(label):
        raise ConfigError(f"{path}: rename the file: its name stands for the key, in plain letters and digits")
    known = trusted()
    if label in known.values() and known.get(_hex(key)) != label:
        held = trust_folder() / f"{label}.pub"
        raise ConfigError(f"another key is trusted as {label!r} already: rename {path.name}, or remove {held}")
    if _hex(key) not in known:
        trust_folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_new(trust_folder() / f"{label}.pub", _public_pem(key), 0o644)
    return Signer(_hex(key), known.get(_hex(key), label))


def trusted() -> dict[str, str]:
    """The keys that this user trusts: hex of the key to its name.

    Raises:
        ConfigError: a file among them is no public key.
    """
    return {_hex(_load_public(path)): path.stem for path in sorted(trust_folder().glob("*.pub"))}


def _written(key: str, signature: str) -> bytes:
    return json.dumps({"key": key, "signature": signature}).encode().ljust(SIGNATURE_BYTES - 1) + b"\n"


def trust_folder() -> Path:
    """Where trusted keys lie as NAME.pub; a file that is removed there is no longer trusted."""
    return home() / "trusted"


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
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
