import json
from pathlib import Path

import pytest

from minserve.errors import ConfigError
from minserve.registry.manifest import LARGEST_MANIFEST, Manifest, read_manifest


def read(folder: Path, content: str | bytes) -> Manifest | None:
    (folder / "MAR-INF").mkdir(exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / "MAR-INF" / "MANIFEST.json").write_bytes(raw)
    return read_manifest(folder)


def test_every_key_is_read(tmp_path: Path) -> None:
    model = {
        "modelName": "m",
        "modelVersion": "3.1",
        "handler": "handler.py:run",
        "envelope": "kserve",
        "configFile": "config.yaml",
        "requirementsFile": "requirements.txt",
        "serializedFile": "m.pt",
    }
    text = json.dumps({"createdOn": "today", "runtime": "python3", "model": model})
    assert read(tmp_path, text) == Manifest(
        *("m", "3.1", "handler.py:run", "python3", "kserve", "config.yaml", "requirements.txt", text)
    )


def test_what_is_not_there_has_torchserves_defaults(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    for text in ("{}", '{"model": {}}', '{"model": {"modelName": "", "handler": null}}'):
        assert read(tmp_path, text) == Manifest(text=text)
    assert (Manifest().version, Manifest().runtime) == ("1.0", "python")


def test_a_number_is_taken_as_it_is_written(tmp_path: Path) -> None:
    manifest = read(tmp_path, '\ufeff{"model": {"modelName": 7, "modelVersion": 1.10}}')
    assert manifest is not None
    assert (manifest.model_name, manifest.version) == ("7", "1.10")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n  nonsense", "MANIFEST.json:2: no JSON"),
        ("", "MANIFEST.json:1: no JSON"),
        (b"\xff\xfe", "not in UTF-8"),
        ("[" * 200_000, "nested too deeply"),
        ("[]", "found [] (a list), allowed: a JSON object"),
        ('{"model": "m"}', 'model: found "m" (a string), allowed: a JSON object'),
        ('{"model": {"handler": ["a"]}, "runtime": true}', "model.handler: found "),
        ('{"model": {"handler": ["a"]}, "runtime": true}', "runtime: found true (a boolean), allowed: a string"),
        ('{"model": {"modelVersion": "1\\ud800"}}', "model.modelVersion: found"),
        ('{"model": {"configFile": "c.yaml\\n2026 a line of its own"}}', "allowed: a string of printable characters"),
        (" " * (LARGEST_MANIFEST + 1), "larger than"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, content)
    assert message in str(error.value)
