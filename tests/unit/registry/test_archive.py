import gzip
import io
import shutil
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from minserve.errors import ConfigError
from minserve.registry import archive as archive_module
from minserve.registry.archive import Limits, extract, is_archive, read_manifest

MANIFEST = '{"runtime": "python", "model": {"modelName": "m", "modelVersion": "2.0", "handler": "handler.py"}}'
FILES = {"MAR-INF/MANIFEST.json": MANIFEST, "handler.py": "x = 1\n", "lib/deep/data.bin": "\0" * 2000}


def write_zip(path: Path, files: dict[str, str], mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # it warns of names that are there twice
        for name, text in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            entry.compress_type = method
            archive.writestr(entry, text)
    return path


def write_tar(path: Path, files: dict[str, str], **attributes: object) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            for key, value in attributes.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


WRITERS: dict[str, Callable[..., Path]] = {"m.mar": write_zip, "m.tar.gz": write_tar}
both_kinds = pytest.mark.parametrize("name", WRITERS)


def refused(archive: Path, tmp_path: Path, limits: Limits | None = None) -> str:
    """Why it is refused; nothing may be left, inside or outside."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as error:
        extract(archive, tmp_path / "into" / "x", limits or Limits())
    assert sorted(tmp_path.rglob("*")) == before
    assert str(archive) in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def _parent_of_the_target(tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()


@both_kinds
def test_an_archive_is_extracted_for_its_owner_alone_and_its_manifest_is_read(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, FILES)
    model = extract(archive, tmp_path / "into" / "x")
    assert model == tmp_path / "into" / "x"
    found = {str(path.relative_to(model)): path.read_text() for path in model.rglob("*") if path.is_file()}
    assert found == FILES
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [model, *model.rglob("*")]}
    assert modes == {0o600, 0o700}
    assert {path for path in model.rglob("*") if path.is_file() and path.stat().st_mode & 0o100} == set()
    manifest = read_manifest(model)
    assert manifest is not None
    assert (manifest.model_name, manifest.version, manifest.handler) == ("m", "2.0", "handler.py")
    assert manifest.text == MANIFEST


@both_kinds
def test_a_file_stays_executable(name: str, tmp_path: Path) -> None:
    mode = stat.S_IFREG | 0o755 if name == "m.mar" else 0o755
    archive = WRITERS[name](tmp_path / name, {"run.sh": "x", "b": "y"}, mode=mode)
    assert stat.S_IMODE((extract(archive, tmp_path / "into" / "x") / "run.sh").stat().st_mode) == 0o700


@both_kinds
def test_the_one_folder_around_everything_is_the_model(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, {f"./m/{file}": text for file, text in FILES.items()})
    assert extract(archive, tmp_path / "into" / "x") == tmp_path / "into" / "x" / "m"


def test_a_lone_manifest_is_not_taken_for_such_a_folder(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "m.mar", {"MAR-INF/MANIFEST.json": MANIFEST})
    assert extract(archive, tmp_path / "into" / "x") == tmp_path / "into" / "x"


@both_kinds
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("/etc/owned", "absolute"),
        ("../owned", "leads out"),
        ("../x-sibling/owned", "leads out"),  # a check by prefix alone lets this one out
        ("a/../../owned", "leads out"),
        ("a/..", "leads out"),
        ("..\\owned", "backslash"),
        (".", "no name"),
        ("n" * 300, "File name too long"),
    ],
)
def test_names_that_lead_out_are_refused(name: str, entry: str, reason: str, tmp_path: Path) -> None:
    assert reason in refused(WRITERS[name](tmp_path / name, {"handler.py": "", entry: "x"}), tmp_path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_a_zip_are_refused(kind: int, tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "m.mar", {"weights": "/etc/passwd"}, mode=kind | 0o777)
    assert "entry 'weights' is a link or a device" in refused(archive, tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "m.tgz", {"weights": ""}, type=kind, linkname="handler.py")
    assert "entry 'weights' is a link or a device" in refused(archive, tmp_path)


@both_kinds
def test_nothing_is_written_twice(name: str, tmp_path: Path) -> None:
    for files in ({"a": "1", "./a": "2"}, {"a": "1", "a/b": "2"}, {"a/b": "1", "a": "2"}):
        assert "is there twice" in refused(WRITERS[name](tmp_path / name, files), tmp_path)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "m.mar", {"handler.py": "x"}, method=zipfile.ZIP_STORED)
    raw = bytearray(archive.read_bytes())
    raw[6] |= 1  # the flags, before the file and in the directory at the end
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(raw)
    assert "entry 'handler.py' is encrypted" in refused(archive, tmp_path)


@both_kinds
def test_bombs_are_refused_by_what_is_written(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, {"handler.py": "", "weights": "\0" * 3_000_000})
    assert "entry 'weights' is too large" in refused(archive, tmp_path, Limits(size=2_000_000))
    assert "compressed more than 200 times" in refused(archive, tmp_path, Limits(ratio_from=1_000_000))
    assert extract(archive, tmp_path / "into" / "x", Limits(ratio=1032, ratio_from=0)).is_dir()


def test_a_size_that_a_zip_lies_about_changes_nothing(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "m.mar", {"weights": "\0" * 3_000_000})
    raw = bytearray(archive.read_bytes())
    directory = raw.index(b"PK\x01\x02")
    struct.pack_into("<L", raw, 22, 10)
    struct.pack_into("<L", raw, directory + 24, 10)
    archive.write_bytes(raw)
    assert "damaged" in refused(archive, tmp_path)


@both_kinds
def test_folders_count_as_files_do(name: str, tmp_path: Path) -> None:
    deep = "/".join("d" * 30) + "/file"
    assert "one too many: at most 20" in refused(
        WRITERS[name](tmp_path / name, {deep: ""}), tmp_path, Limits(entries=20)
    )
    many = {f"f{number}": "" for number in range(21)}
    assert "entry 'f20' is one too many" in refused(WRITERS[name](tmp_path / name, many), tmp_path, Limits(entries=20))


def test_a_tar_header_is_not_read_into_memory_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "_LARGEST_HEADER", 100_000)
    archive = write_tar(tmp_path / "m.tgz", {"a": "x"}, pax_headers={"comment": "c" * 200_000})
    assert "a header of more than 100000 bytes" in refused(archive, tmp_path)


@both_kinds
def test_a_damaged_archive_is_refused_wherever_it_is_cut(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, FILES)
    whole = archive.read_bytes()
    for size in range(0, len(whole), 7):
        archive.write_bytes(whole[:size])
        refused(archive, tmp_path)


def test_a_byte_that_has_changed_is_noticed(tmp_path: Path) -> None:
    plain = gzip.decompress(write_tar(tmp_path / "m.tgz", FILES).read_bytes())
    raw = bytearray(gzip.compress(plain))
    raw[-8] ^= 1  # the checksum
    (tmp_path / "m.tgz").write_bytes(raw)
    assert "CRC" in refused(tmp_path / "m.tgz", tmp_path)


def test_what_is_no_archive_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.mar").write_text("not a zip at all")
    assert "neither a zip archive nor a tar archive in gzip" in refused(tmp_path / "m.mar", tmp_path)
    assert "No such file" in refused(tmp_path / "absent.mar", tmp_path)


def test_it_ends_when_somebody_removes_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server does when it stops, which waits for the thread that unpacks."""
    monkeypatch.setattr(archive_module._Target, "_count_bytes", lambda *_: shutil.rmtree(tmp_path / "into" / "x"))
    archive = write_zip(tmp_path / "m.mar", FILES)
    assert "entry 'MAR-INF/MANIFEST.json' was removed while it was unpacked" in refused(archive, tmp_path)


def test_a_target_that_is_there_already_is_not_touched(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "m.mar", FILES)
    (tmp_path / "into" / "x").mkdir()
    (tmp_path / "into" / "x" / "mine").touch()
    with pytest.raises(ConfigError, match="File exists"):
        extract(archive, tmp_path / "into" / "x")
    assert (tmp_path / "into" / "x" / "mine").exists()


def test_a_file_that_is_called_like_an_archive_is_one(tmp_path: Path) -> None:
    for name in ("a.mar", "b.MODEL", "c.zip", "d.tgz", "e.tar.gz", "f.txt", "g.gz"):
        (tmp_path / name).touch()
    (tmp_path / "folder.mar").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir() if is_archive(path)) == [
        *("a.mar", "b.MODEL", "c.zip", "d.tgz", "e.tar.gz")
    ]
