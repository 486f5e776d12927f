"""A certificate that nobody trusts."""

from __future__ import annotations

import datetime
from pathlib import Path


def make_certificate(folder: Path, host: str) -> tuple[str, str]:
    """Paths of a certificate for `host` and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
    pem = built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "crt.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(secret)
    return str(folder / "crt.pem"), str(folder / "key.pem")
