import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12

from minserve.config.server import ServerOptions
from minserve.errors import StartupError
from minserve.frontend.tls import Identity, read_identity, tls_context


@pytest.fixture(scope="module")
def made() -> Identity:
    return read_identity(ServerOptions(host="10.1.2.3"))


def handshake(
    context: ssl.SSLContext, certificate: bytes, name: str, newest: ssl.TLSVersion | None = None
) -> str | None:
    """Has a client that trusts this certificate alone talk to the server, in memory; the version that they agree on."""
    trusting = ssl.create_default_context(cadata=certificate.decode())
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if newest is not None:
        trusting.minimum_version, trusting.maximum_version = newest, newest
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(up, down, server_side=True)
    client = trusting.wrap_bio(down, up, server_hostname=name)
    waiting = [client, server]
    for _ in range(10):
        for one in list(waiting):
            try:
                one.do_handshake()
                waiting.remove(one)
            except ssl.SSLWantReadError:
                continue
    assert not waiting
    return client.version()


def keystore(made: Identity, password: bytes) -> bytes:
    key = serialization.load_pem_private_key(made.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    certificate = x509.load_pem_x509_certificate(made.certificate)
    return pkcs12.serialize_key_and_certificates(
        b"ts", key, certificate, None, serialization.BestAvailableEncryption(password)
    )


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "10.1.2.3"])
def test_a_certificate_made_on_the_spot_is_for_this_machine(made: Identity, name: str) -> None:
    assert handshake(tls_context(made), made.certificate, name) == "TLSv1.3"


def test_it_is_for_nobody_else(made: Identity) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tls_context(made), made.certificate, "elsewhere.example")


def test_tls_1_2_is_the_oldest(made: Identity) -> None:
    assert handshake(tls_context(made), made.certificate, "localhost", ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert tls_context(made).minimum_version is ssl.TLSVersion.TLSv1_2


def test_pem_files(made: Identity, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(made.key)
    (tmp_path / "crt").write_bytes(made.certificate)
    options = ServerOptions(private_key_file=str(tmp_path / "key"), certificate_file=str(tmp_path / "crt"))
    assert handshake(tls_context(read_identity(options)), made.certificate, "localhost")


def test_a_keystore(made: Identity, tmp_path: Path) -> None:
    file = tmp_path / "k.p12"
    file.write_bytes(keystore(made, b"changeit"))
    identity = read_identity(ServerOptions(keystore=str(file)))
    assert handshake(tls_context(identity), made.certificate, "localhost")
    with pytest.raises(StartupError, match=r"k.p12: not PKCS #12, or keystore_pass is not its password$"):
        read_identity(ServerOptions(keystore=str(file), keystore_pass="wrong"))
    file.write_bytes(b"\xfe\xed\xfe\xed" + bytes(20))
    with pytest.raises(StartupError, match="found a Java keystore"):
        read_identity(ServerOptions(keystore=str(file)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"private_key_file": "/none"}, "certificate_file: found nothing, allowed: a PEM file"),
        ({"certificate_file": "/none"}, "private_key_file: found nothing"),
        ({"certificate_file": "/none", "private_key_file": "/none"}, "private_key_file /none: No such file"),
        ({"certificate_file": "/a", "private_key_file": "/b", "keystore": "/c"}, "keystore: found beside"),
        ({"keystore": "/none"}, "keystore /none: No such file"),
    ],
)
def test_options_that_do_not_work(options: dict[str, str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        read_identity(ServerOptions.model_validate(options))


def test_a_key_that_does_not_fit(made: Identity) -> None:
    other = read_identity(ServerOptions())
    with pytest.raises(StartupError, match=r"^here: the key is not that of the certificate$"):
        tls_context(Identity(made.certificate, other.key, "here"))
    with pytest.raises(StartupError, match="here: found no certificate with its private key in PEM"):
        tls_context(Identity(b"junk", b"junk", "here"))


def test_an_encrypted_key_asks_nobody_for_its_password(made: Identity) -> None:
    key = serialization.load_pem_private_key(made.key, None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    with pytest.raises(StartupError, match="here: the private key is encrypted, allowed: one without a password"):
        tls_context(Identity(made.certificate, locked, "here"))
