"""The model store of the comparison, built by torch-model-archiver or by `minserve archive`: both take the same flags."""

from __future__ import annotations

import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Archive:
    """What one call of the archiver gets. `file` is the archive's name where it is not the model's."""

    name: str
    source: str
    version: str = "1.0"
    weights: str = ""
    flags: tuple[str, ...] = ()
    file: str = ""


ARCHIVES = (
    Archive("echo", "echo", "1.0", flags=("--config-file", "model-config.yaml")),
    Archive("echo", "echo", "2.0", file="echo-two"),
    Archive("replies", "replies"),
    Archive("eager", "eager", "1.5", "weights.pt", ("--model-file", "model.py", "--extra-files", "index_to_name.json")),
    Archive("scripted", "eager", "1.0", "scripted.pt", ("--extra-files", "index_to_name.json")),
    Archive("image", "image", "1.0", "image.pt", ("--model-file", "model.py", "--extra-files", "index_to_name.json")),
    Archive("tp4", "tp4", flags=("--config-file", "model-config.yaml")),
    Archive("batch", "batch", flags=("--config-file", "model-config.yaml")),
    Archive("measured", "measured", flags=("--archive-format", "tgz")),
    Archive("failing", "failing"),
    Archive(
        "pieces",
        "pieces",
        "2023.11-rc1",
        flags=(
            "--extra-files",
            "extras,words.txt",
            "--config-file",
            "model-config.yaml",
            "--archive-format",
            "no-archive",
        ),
    ),
    Archive("micro", "micro", weights="scripted.pt", flags=("--config-file", "model-config.yaml")),
    Archive("pipe", "pipe", flags=("--config-file", "model-config.yaml", "--runtime", "python3")),
    Archive("sloppy", "sloppy", flags=("--config-file", "model-config.yaml", "--archive-format", "zip-store")),
    Archive("inputs", "inputs"),
)


def build_store(store: Path, work: Path, archiver: Sequence[str]) -> None:
    """Makes every archive of the store, and one that is none.

    Args:
        store: an empty folder.
        work: another, for weights.
        archiver: the command, `torch-model-archiver` or another with its flags.
    """
    _make_weights(work)
    for archive in ARCHIVES:
        command = [*archiver, "--model-name", archive.name, "--version", archive.version, "--handler", "handler.py"]
        if archive.weights:
            command += ["--serialized-file", str(work / archive.weights)]
        target = work / archive.file if archive.file else store
        command += [*archive.flags, "--export-path", str(target), "--force"]
        target.mkdir(exist_ok=True)
        subprocess.run(command, cwd=MODELS / archive.source, check=True, capture_output=True, timeout=120)
        if archive.file:
            (target / f"{archive.name}.mar").rename(store / f"{archive.file}.mar")
    (store / "junk.mar").write_bytes(b"this is no zip file")


def _make_weights(folder: Path) -> None:
    """Weights that are the same with every version of torch."""
    import torch

    def even(module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        return module.eval()

    class Linear(torch.nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, outputs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.layer(x), dim=1)

    two = even(Linear(2))
    torch.save(two.state_dict(), folder / "weights.pt")
    torch.save(even(Linear(3)).state_dict(), folder / "image.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, its archives are there
        torch.jit.trace(two, torch.zeros(1, 3)).save(str(folder / "scripted.pt"))  # type: ignore[no-untyped-call]
