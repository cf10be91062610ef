from __future__ import annotations

import pytest
import torch
from torch import nn

from minserve.handlers.tensor_parallel import TensorParallel


def test_a_single_rank_has_the_whole_layer_and_talks_to_nobody() -> None:
    layer = nn.Linear(4, 6)
    x = torch.randn(3, 4)
    tp = TensorParallel.over()
    assert tp == TensorParallel()
    torch.testing.assert_close(tp.column(layer.weight, layer.bias)(x), layer(x))
    torch.testing.assert_close(tp.row(layer.weight, layer.bias)(x), layer(x))


def test_a_share_does_not_keep_the_full_weight_alive() -> None:
    full = nn.Linear(4, 6).weight
    for cut in (TensorParallel(1, 2).column(full), TensorParallel(1, 2).row(full)):
        assert cut.weight.untyped_storage().nbytes() == full.untyped_storage().nbytes() // 2
        assert not cut.weight.requires_grad


def test_what_cannot_be_dealt_out_is_refused() -> None:
    tp = TensorParallel(rank=0, size=5)
    with pytest.raises(ValueError, match="12 attention heads cannot be dealt out to 5 ranks evenly"):
        tp.share(12)
    with pytest.raises(ValueError, match="6 outputs"):
        tp.column(torch.ones(6, 5))
    with pytest.raises(ValueError, match="6 inputs"):
        tp.row(torch.ones(5, 6))


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no linear layer is named like '\*\.q_proj'"):
        TensorParallel(0, 2).shard(nn.Sequential(nn.Linear(2, 2)), column=["0", "*.q_proj"], row=[])
