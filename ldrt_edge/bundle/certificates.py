"""Signatures by certificate: a clinic trusts its own authority once, and whoever that one lets sign code may sign.

    bundle.sig  {"certificates": [the signer's, then those between it and the authority, DER in base64], "signature"}

The chain travels with the signature, so that nothing is asked of a network, and holds only while all of it is valid by
this machine's clock. The cryptography package builds and checks it; what is asked beyond its rules stands here: a
signer's certificate is for signing code, and is no authority.

Source: RFC 5280 (certificates, path validation), RFC 6979 (the same ECDSA signature for the same bytes each time).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store, VerificationError

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_BETWEEN_LIMIT = 4  # authorities between the signer and the trusted one
_CODE = {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
_HASH = hashes.SHA256()


def sign(message: bytes, secret: SigningKey, chain: Sequence[x509.Certificate]) -> bytes:
    """A message's signature by `secret`, to which the first certificate of `chain` belongs.

    Raises:
        ValueError: says why nobody would accept it.
    """
    if chain[0].public_key() != secret.public_key():
        raise ValueError("the first certificate belongs to another key")
    try:
        _may_sign_code(None, chain[0], chain[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        raise ValueError("the first certificate is not for signing code") from None
    if not chain[0].not_valid_before_utc <= datetime.now(UTC) <= chain[0].not_valid_after_utc:
        raise ValueError("the first certificate is not valid today")
    if isinstance(secret, rsa.RSAPrivateKey):
        return secret.sign(message, padding.PKCS1v15(), _HASH)
    return secret.sign(message, ec.ECDSA(_HASH, deterministic_signing=True))


def as_fields(chain: Sequence[x509.Certificate], signature: bytes) -> dict[str, object]:
    """What a bundle's signature holds."""
    packed = [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode() for certificate in chain]
    return {"certificates": packed, "signature": signature.hex()}


def read_chain(packed: Sequence[str]) -> list[x509.Certificate]:
    """The certificates in a signature.

    Raises:
        ValueError: none, too many, or no certificates.
    """
    if not isinstance(packed, list) or not 1 <= len(packed) <= 1 + _BETWEEN_LIMIT:
        raise ValueError("no chain of certificates")
    try:
        return [x509.load_der_x509_certificate(base64.b64decode(each, validate=True)) for each in packed]
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from error


def check_signature(message: bytes, signature: bytes, signer: x509.Certificate) -> None:
    """Hold a signature against a signer's certificate, whoever that is.

    Raises:
        ValueError, InvalidSignature, UnsupportedAlgorithm: it is not his of this message.
    """
    key = signer.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, message, padding.PKCS1v15(), _HASH)
    elif isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(_HASH))
    else:
        raise ValueError("neither an elliptic curve's key nor an RSA key")


def authority_of(
    chain: Sequence[x509.Certificate], trusted: Iterable[x509.Certificate], when: datetime
) -> tuple[x509.Certificate | None, str]:
    """Which of the trusted authorities lets the first of `chain` sign at this time; None with the reason if none."""
    roots = list(trusted)
    if not roots:
        return None, "no authority is trusted"
    own = (
        ExtensionPolicy.permit_all()
        .require_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _may_sign_code)
        .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, _is_no_authority)
        .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _may_sign)
    )
    authorities = ExtensionPolicy.webpki_defaults_ca().may_be_present(
        x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _may_sign_code
    )
    policy = PolicyBuilder().store(Store(roots)).time(when).max_chain_depth(_BETWEEN_LIMIT)
    verifier = policy.extension_policies(ca_policy=authorities, ee_policy=own).build_client_verifier()
    try:
        return verifier.verify(chain[0], list(chain[1:])).chain[-1], ""
    except (VerificationError, UnsupportedAlgorithm) as error:
        return None, str(error).partition(" (encountered")[0]


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may issue others, so that trusting it means something."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def subject_of(certificate: x509.Certificate) -> str:
    """Whom it is about, in one line that a terminal shows as it is."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    told = str(names[0].value) if names else certificate.subject.rfc4514_string()
    return "".join(letter if letter.isprintable() else "?" for letter in told)[:100]


def fingerprint_of(certificate: x509.Certificate) -> str:
    """Its sha256, as hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def _may_sign_code(_: Policy | None, __: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
    if usage is not None and not _CODE & set(usage):
        raise ValueError("a certificate is not for signing code")


def _is_no_authority(_: Policy, __: x509.Certificate, constraints: x509.BasicConstraints | None) -> None:
    if constraints is not None and constraints.ca:
        raise ValueError("the signer's certificate is an authority's")


def _may_sign(_: Policy, __: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.digital_signature:
        raise ValueError("the signer's certificate is not for signatures")
