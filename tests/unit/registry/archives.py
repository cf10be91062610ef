"""Archives for the tests, as torch-model-archiver makes them."""

import json
import tempfile
import zipfile
from pathlib import Path

from minserve.worker.runtime import RuntimeDirectory

HANDLER = "def handle(data, context):\n    return [b'x'] * len(data or [])\n"


def manifest(**model: object) -> str:
    """A MANIFEST.json; `runtime` goes where it belongs."""
    runtime = model.pop("runtime", "python")
    return json.dumps({"runtime": runtime, "model": {"modelName": "m", "handler": "h.py", **model}})


def make_mar(path: Path, files: dict[str, str] | None = None, **model: object) -> Path:
    """Writes a .mar. What is None in `model` is left out."""
    text = manifest(**model)
    document = json.loads(text)
    document["model"] = {key: value for key, value in document["model"].items() if value is not None}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(document))
        for name, content in {"h.py": HANDLER, **(files or {})}.items():
            archive.writestr(name, content)
    return path


def short_runtime(folder: Path) -> RuntimeDirectory:
    """A runtime directory beside a test's own folder, whose name would make the addresses of sockets too long."""
    return RuntimeDirectory({"MINSERVE_RUNTIME_DIR": tempfile.mkdtemp(prefix="r", dir=folder.parent)})
