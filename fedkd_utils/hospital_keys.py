"""Certificates and keys for a federation on one machine; ``docs/hospital.md`` does the same by hand for several."""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

#: Days for which a certificate is valid.
DAYS = 30


def write_certificates(folder: Path, host: str) -> None:
    """An authority of its own (``ca.pem``) and a server certificate (``server.pem``, ``server.key``) for one address.

    The authority's key is not kept: nobody can sign a second server with it.
    """
    authority_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    authority_name, server_name = _name("fedkd loopback authority"), _name("fedkd loopback server")
    authority = (
        _certificate(authority_name, authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    addresses = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(host))])
    server = (
        _certificate(server_name, authority_name, server_key.public_key())
        .add_extension(addresses, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    _write(folder / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    _write(folder / "server.pem", server.public_bytes(serialization.Encoding.PEM))
    _write(folder / "server.key", _private(server_key, serialization.PrivateFormat.PKCS8))


def write_node_key(folder: Path, name: str) -> Path:
    """A key pair for a node, ``<name>.key`` and ``<name>.pub``; what is there stays. The path of the public half."""
    public = folder / f"{name}.pub"
    if not public.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        _write(folder / f"{name}.key", _private(key, serialization.PrivateFormat.OpenSSH))
        openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        _write(public, key.public_key().public_bytes(*openssh) + b"\n")
    return public


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _certificate(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=DAYS))
    )


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes) -> None:
    """A file that only its owner may read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
