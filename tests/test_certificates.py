"""Bundles signed by certificate: an authority is trusted once, and only whom it lets sign code may sign."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from bundling import write_small
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ldrt_edge.bundle import container, keys
from ldrt_edge.bundle.certificates import SigningKey
from ldrt_edge.bundle.container import open_bundle
from ldrt_edge.bundle.open import accept
from ldrt_edge.cli import cli
from ldrt_edge.errors import ArtifactError, ConfigError

CODE, WEB = ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.SERVER_AUTH


class Holder:
    """A key and its certificate; an authority's may issue others."""

    def __init__(
        self, name: str, issuer: Holder | None = None, *, authority: bool = False,
        use: x509.ObjectIdentifier | None = CODE, days: tuple[int, int] = (-1, 10), key: SigningKey | None = None,
    ) -> None:  # fmt: skip
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.chain_above = [issuer.certificate, *issuer.chain_above] if issuer else []
        subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.now(UTC)
        above, above_key = (issuer.certificate.subject, issuer.key) if issuer else (subject, self.key)
        made = x509.CertificateBuilder(above, subject, self.key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now + timedelta(days[0])).not_valid_after(now + timedelta(days[1]))
        made = made.add_extension(x509.BasicConstraints(authority, None), True)
        made = made.add_extension(
            x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False), True
        )
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above_key.public_key()), False)
        if use and not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([use]), False)
        self.certificate = made.sign(above_key, hashes.SHA256())

    def write(self, folder: Path, label: str) -> tuple[Path, Path]:
        """The secret key, and the chain below the last authority, as two PEM files."""
        secret, chain = folder / f"{label}.key", folder / f"{label}.pem"
        secret.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        below = [self.certificate, *self.chain_above[:-1]]
        chain.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in below))
        return secret, chain


@pytest.fixture
def clinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Holder:
    """An authority that this user trusts."""
    monkeypatch.setenv("LDRT_EDGE_HOME", str(tmp_path / "home"))
    authority = Holder("The clinic's authority", authority=True)
    path = tmp_path / "clinic.pem"
    path.write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    assert keys.trust(path).subject == "The clinic's authority"
    return authority


@pytest.fixture
def signed_by(tmp_path: Path) -> Callable[[Holder], Path]:
    """Signs a small bundle past all checks that signing makes of the signer."""

    def sign(holder: Holder) -> Path:
        path = write_small(tmp_path / "small.ldrt")
        opened = open_bundle(path)
        below = [holder.certificate, *holder.chain_above[:-1]]
        value = holder.key.sign(keys._CONTEXT + opened.raw, ec.ECDSA(hashes.SHA256()))  # type: ignore[call-arg,arg-type]
        container.replace_signature(opened, keys._written(keys.certificates.as_fields(below, value)))
        return path

    return sign


@pytest.mark.parametrize("kind", ["curve", "rsa"])
def test_whom_a_trusted_authority_lets_sign_code_may_sign(clinic: Holder, tmp_path: Path, kind: str) -> None:
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP384R1())
    physics = Holder("Medical physics", clinic, authority=True)
    secret, chain = Holder("A. Physicist", physics, key=key).write(tmp_path, "physicist")
    path = write_small(tmp_path / "small.ldrt")
    arguments = ["bundle", "sign", str(path), "--key", str(secret), "--certificate", str(chain)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0 and "clinic, A. Physicist (certificate" in done.stdout, done.exception
    signer = accept(open_bundle(path))
    assert signer is not None and signer.trusted_as == "clinic" and signer.subject == "A. Physicist"
    before = path.read_bytes()
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert path.read_bytes() == before, "the same signature each time"

    (keys.trusted_file(signer)).unlink()
    with pytest.raises(ArtifactError, match=r"do not trust, A\. Physicist .*no authority is trusted"):
        accept(open_bundle(path))


def test_others_certificates_are_refused(clinic: Holder, signed_by: Callable[[Holder], Path]) -> None:
    stranger, signer = Holder("The clinic's authority", authority=True), Holder("A. Physicist", clinic)
    late = Holder("Late", clinic, authority=True, days=(-9, -1))
    strangers = {
        "another authority of the same name": Holder("A. Physicist", stranger),
        "its own authority": Holder("A. Physicist"),
        "for web pages": Holder("www", clinic, use=WEB),
        "for nothing in particular": Holder("anything", clinic, use=None),
        "no longer": Holder("Retired", clinic, days=(-9, -1)),
        "not yet": Holder("Hired", clinic, days=(1, 9)),
        "an authority that ended": Holder("A. Physicist", late),
        "an authority itself": Holder("Authority", clinic, authority=True),
        "issued by a signer": Holder("Friend", signer),
    }
    for holder in strangers.values():
        with pytest.raises(ArtifactError, match="a key that you do not trust"):
            accept(open_bundle(signed_by(holder)))
    assert accept(open_bundle(signed_by(signer))) is not None


def test_a_certificate_does_not_make_another_keys_signature(
    clinic: Holder, signed_by: Callable[[Holder], Path], tmp_path: Path
) -> None:
    signer = Holder("A. Physicist", clinic)
    stolen = Holder("A. Physicist", clinic)
    stolen.certificate = signer.certificate
    with pytest.raises(ArtifactError, match="not that of this bundle"):
        accept(open_bundle(signed_by(stolen)))
    secret, _ = stolen.write(tmp_path, "thief")
    with pytest.raises(ConfigError, match="belongs to another key"):
        keys.sign(b"", secret, None, signer.write(tmp_path, "signer")[1])
    for holder, why in ((Holder("www", clinic, use=WEB), "not for"), (Holder("x", clinic, days=(-9, -1)), "not valid")):
        with pytest.raises(ConfigError, match=why):
            keys.sign(b"", holder.write(tmp_path, "x")[0], None, holder.write(tmp_path, "x")[1])


def test_any_changed_byte_of_such_a_signature_is_found(clinic: Holder, signed_by: Callable[[Holder], Path]) -> None:
    path = signed_by(Holder("A. Physicist", clinic))
    opened = open_bundle(path)
    end = len(opened.signature.rstrip()) + 40
    for position in range(end):
        changed = bytearray(opened.signature)
        changed[position] ^= 1 << position % 8
        container.replace_signature(opened, bytes(changed))
        with pytest.raises(ArtifactError):
            accept(open_bundle(path))


def test_only_authorities_are_trusted_by_certificate(clinic: Holder, tmp_path: Path) -> None:
    _, chain = Holder("A. Physicist", clinic).write(tmp_path, "one")
    with pytest.raises(ConfigError, match="not the certificate of an authority"):
        keys.trust(chain)
    other = tmp_path / "other" / "clinic.pem"
    other.parent.mkdir()
    other.write_bytes(Holder("Another", authority=True).certificate.public_bytes(Encoding.PEM))
    with pytest.raises(ConfigError, match="another key is trusted as 'clinic'"):
        keys.trust(other)
    _, public = keys.keygen(tmp_path / "clinic")
    with pytest.raises(ConfigError, match="another key is trusted as 'clinic'"):
        keys.trust(public)
