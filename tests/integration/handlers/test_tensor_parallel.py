from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from minserve.handlers.mesh import build_mesh
from minserve.handlers.pipeline import Pipeline
from minserve.handlers.tensor_parallel import TensorParallel
from tests.integration.handlers.group import run_group

CPU = torch.device("cpu")
WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Attention and an MLP. The number of local heads follows from the width of the query."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        x = x + self.merge(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(functional.gelu(self.up(x)))
        return out


def full_blocks(number: int = 2) -> list[Block]:
    torch.manual_seed(7)  # the full weights have to be the same on all ranks
    return [Block() for _ in range(number)]


def inputs() -> list[Tensor]:
    return [torch.linspace(-1, 1, batch * 3 * WIDTH).view(batch, 3, WIDTH) for batch in (1, 5, 2)]


def expected() -> list[Tensor]:
    with torch.inference_mode():
        return [nn.Sequential(*full_blocks())(x) for x in inputs()]


def run_sharded(rank: int, ranks: int) -> tuple[list[Tensor], int]:
    model = nn.Sequential(*full_blocks())
    tp = TensorParallel.over()
    assert (tp.rank, tp.size, tp.share(12)) == (rank, ranks, 12 // ranks)
    tp.shard(model, column=["*.query", "*.key", "*.value", "*.up"], row=["*.merge", "*.down"])
    with torch.inference_mode():
        outputs = [model(x) for x in inputs()]
    return outputs, sum(p.untyped_storage().nbytes() for p in model.parameters())


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sharded_model_gives_the_result_of_the_full_one_on_every_rank(tmp_path: Path, ranks: int) -> None:
    full = sum(p.untyped_storage().nbytes() for p in nn.Sequential(*full_blocks()).parameters())
    for outputs, nbytes in run_group(tmp_path, ranks, run_sharded, ranks):
        for output, target in zip(outputs, expected(), strict=True):
            torch.testing.assert_close(output, target, atol=1e-5, rtol=0)
        assert (
            full / ranks <= nbytes < full / ranks + 3000
        )  # each rank also has the whole bias of the row-parallel layers


def cut_from_file(rank: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    tp = TensorParallel.over()
    with safe_open(path, framework="pt") as file:
        column = tp.column(file.get_slice("weight"), file.get_slice("bias"))
        row = tp.row(file.get_slice("weight"), file.get_slice("bias"))
    x = torch.arange(8.0)
    return column(x), row(x[rank * 4 : rank * 4 + 4]), row.weight.data


def test_safetensors_slices_are_cut_as_tensors_are(tmp_path: Path) -> None:
    layer = nn.Linear(8, 6)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    save_file({"weight": weight, "bias": bias}, tmp_path / "model.safetensors")
    results = run_group(tmp_path, 2, cut_from_file, str(tmp_path / "model.safetensors"))
    target = functional.linear(torch.arange(8.0), weight, bias)
    torch.testing.assert_close(torch.cat([column for column, _, _ in results]), target)
    for rank, (_, row, share) in enumerate(results):
        torch.testing.assert_close(row, target)
        assert torch.equal(share, weight[:, rank * 4 : rank * 4 + 4])


def run_in_mesh(rank: int) -> list[tuple[Tensor, ...] | None]:
    mesh = build_mesh(CPU, tp=2)
    pipeline = Pipeline(CPU, mesh)
    block = full_blocks()[pipeline.stage]
    tp = TensorParallel.over(mesh.get_group("tp"))
    tp.shard(block, column=["query", "key", "value", "up"], row=["merge", "down"])
    with torch.inference_mode():
        return [pipeline.run(block, x) for x in inputs()]


def test_stages_of_a_mesh_are_split_over_their_own_ranks(tmp_path: Path) -> None:
    first, second, *others = run_group(tmp_path, 4, run_in_mesh)
    for results in (first, second):
        for (output,), target in zip(results, expected(), strict=True):
            torch.testing.assert_close(output, target, atol=1e-5, rtol=0)
    assert others == [[None] * 3] * 2
