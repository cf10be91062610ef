"""The server's certificate: from PEM files, from a PKCS #12 keystore, or made on the spot; and TLS with it.

The key is held in memory alone: OpenSSL reads it from an anonymous file that no other process has a name for.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.errors import StartupError

if TYPE_CHECKING:
    from cryptography import x509

    from minserve.config.server import ServerOptions

LIFETIME = datetime.timedelta(days=365)  # of a certificate made on the spot, for as long as the server runs
CLOCK_SKEW = datetime.timedelta(hours=1)  # of clients


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the server is, in PEM.

    Attributes:
        certificate: its own first, then those up to an authority.
        source: the options that it comes from, for messages.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    source: str


def read_identity(options: ServerOptions) -> Identity:
    """The certificate that the options name, or without one a certificate that the server signs itself.

    Raises:
        StartupError: a file is not there or not what it should be, or the options contradict each other.
    """
    if options.private_key_file or options.certificate_file:
        missing = "certificate_file" if options.private_key_file else "private_key_file"
        if not getattr(options, missing):
            raise StartupError(
                f"{missing}: found nothing, allowed: a PEM file; private_key_file and certificate_file go together"
            )
        if options.keystore:
            raise StartupError("keystore: found beside private_key_file and certificate_file, allowed: one of the two")
        source = f"certificate_file {options.certificate_file}, private_key_file {options.private_key_file}"
        key = _read("private_key_file", options.private_key_file)
        return Identity(_read("certificate_file", options.certificate_file), key, source)
    if options.keystore:
        return _from_keystore(options.keystore, options.keystore_pass)
    return _self_signed(options.host)


def tls_context(identity: Identity) -> ssl.SSLContext:
    """TLS 1.2 and above.

    Raises:
        StartupError: key and certificate do not belong together, or are none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    locked = False

    def ask() -> str:
        """Instead of OpenSSL's own question on the terminal."""
        nonlocal locked
        locked = True
        return ""

    file = os.memfd_create("minserve-tls")
    try:
        with open(file, "wb", closefd=False) as writing:
            writing.write(identity.certificate.rstrip() + b"\n" + identity.key)
        context.load_cert_chain(f"/proc/self/fd/{file}", password=ask)
    except ssl.SSLError as error:
        reason = "the private key is encrypted, allowed: one without a password" if locked else _reason(error)
        raise StartupError(f"{identity.source}: {reason}") from None
    finally:
        os.close(file)
    return context


def _reason(error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not that of the certificate"
    return f"found no certificate with its private key in PEM ({error.reason or 'not PEM'})"


def _read(option: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise StartupError(f"{option} {file}: {error.strerror}") from None


def _from_keystore(file: str, password: str) -> Identity:
    content = _read("keystore", file)
    if content[:4] in (b"\xfe\xed\xfe\xed", b"\xce\xce\xce\xce"):
        raise StartupError(
            f"keystore {file}: found a Java keystore (JKS or JCEKS), allowed: PKCS #12; "
            "`keytool -importkeystore -deststoretype PKCS12` makes one of it"
        )
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.serialization import pkcs12
    except ImportError:
        raise _without_cryptography("a keystore") from None
    try:
        store = pkcs12.load_pkcs12(content, password.encode())
    except ValueError:
        raise StartupError(f"keystore {file}: not PKCS #12, or keystore_pass is not its password") from None
    if store.key is None or store.cert is None:
        raise StartupError(f"keystore {file}: No key entry found in keystore.")
    chain = [store.cert.certificate, *(one.certificate for one in store.additional_certs)]
    key = store.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    certificate = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain)
    return Identity(certificate, key, f"keystore {file}")


def _self_signed(host: str) -> Identity:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise _without_cryptography("https without private_key_file and certificate_file") from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Identity(certificate.public_bytes(pem), private, "the certificate made by the server")


def _names(host: str) -> list[x509.GeneralName]:
    """What this machine is called, by itself and by `host`."""
    from cryptography import x509

    names: list[x509.GeneralName] = []
    for name in dict.fromkeys(["localhost", "127.0.0.1", "::1", host, socket.gethostname()]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            if name.isascii():  # the others have no form in a certificate that all clients know
                names.append(x509.DNSName(name))
    return names


def _without_cryptography(what: str) -> StartupError:
    return StartupError(f"{what} needs the package cryptography: pip install 'minserve[tls]'")
