"""The base of handlers written for TorchServe, which also serves a model by itself where requests are rows of numbers."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from ..handler_utils.timer import timed
from ..utils.util import load_label_mapping
from . import model_files
from .compiling import compile_model, compile_options, is_compiled_ahead
from .explaining import captum_class, target_of
from .profiling import run_profiled

if TYPE_CHECKING:
    from minserve.rank.context import Context

# Names that handlers look at.
PROFILER_AVAILABLE = True
PT2_AVAILABLE = True
PT230_AVAILABLE = True
XLA_AVAILABLE = False
IPEX_AVAILABLE = False
ONNX_AVAILABLE = importlib.util.find_spec("onnxruntime") is not None

logger = logging.getLogger(__name__)


class BaseHandler:
    """Loads the archive's model and takes a batch through `preprocess`, `inference` and `postprocess`.

    Attributes:
        model: what the archive's files make: a module, a TorchScript module, an onnxruntime session, a compiled function.
        mapping: labels by class number as text, of index_to_name.json; None without it.
        device: where the model is.
        map_location: the kind of `device`.
        initialized: `initialize` is through.
        context: of the batch.
        model_pt_path: the serialized file; None where the manifest names none.
        manifest: the archive's MANIFEST.json.
        model_yaml_config: the model's YAML.
        explain: the batch asks for an explanation.
        target: the class to explain; for handlers that keep it here.
        profiler_args: arguments for `torch.profiler.profile`.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.mapping: dict[str, str] | None = None
        self.device: Any = None
        self.initialized: bool | None = False
        self.context: Any = None
        self.model_pt_path: str | None = None
        self.manifest: Any = None
        self.map_location: str | None = None
        self.explain = False
        self.target = 0
        self.profiler_args: dict[str, Any] = {}
        if torch.cuda.is_available():
            # TF32 on tensor cores, as TorchServe has it. Here, because many handlers have an `initialize` of their own.
            torch.set_float32_matmul_precision("high")

    def initialize(self, context: Context) -> None:
        """Loads the model: the class in `modelFile` with its weights, or else TorchScript, ONNX or a compiled library.

        Raises:
            RuntimeError: there is nothing to load, or a file is missing or of another kind.
            ValueError: the model file defines no class or several, or the YAML's `pt2` is wrong.
        """
        self.model_yaml_config = getattr(context, "model_yaml_config", None) or {}
        self.manifest = context.manifest
        properties: Any = context.system_properties
        self.map_location, self.device = model_files.choose_device(properties.get("gpu_id"))
        model_dir = str(properties.get("model_dir"))
        files = self.manifest["model"]
        serialized = files.get("serializedFile")
        self.model_pt_path = os.path.join(model_dir, serialized) if serialized else None
        self.model = self._load_model(model_dir, files.get("modelFile"))
        logger.debug("model file %s is loaded", self.model_pt_path)
        options = compile_options(self.model_yaml_config)
        if options is not None:
            self.model = compile_model(self.model, options)
        self.mapping = load_label_mapping(os.path.join(model_dir, "index_to_name.json"))
        self.initialized = True

    def _load_model(self, model_dir: str, model_file: str | None) -> Any:
        path = self.model_pt_path
        if model_file:
            model = self._load_pickled_model(model_dir, model_file, path)
            model.to(self.device)
            model.eval()
            return model
        if path is None:
            raise RuntimeError(
                "No model weights could be loaded: the manifest has neither modelFile nor serializedFile"
            )
        if path.endswith(".pt"):
            model = self._load_torchscript_model(path)
            model.eval()
            return model
        if path.endswith(".onnx"):
            return model_files.load_onnx(path, self.device)
        if path.endswith(".so") and self._use_torch_export_aot_compile():
            return self._load_torch_export_aot_compile(path)
        raise RuntimeError(
            f"No model weights could be loaded: without a modelFile, {os.path.basename(path)} must be TorchScript (.pt), "
            "ONNX (.onnx), or a library of AOTInductor (.so, with pt2: {export: {aot_compile: true}} in the model's YAML)"
        )

    # Steps of `initialize` that handlers call or replace.

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> Any:
        return model_files.load_eager(model_dir, model_file, model_pt_path, self.device if self.map_location else None)

    def _load_torchscript_model(self, model_pt_path: str) -> Any:
        return model_files.load_torchscript(model_pt_path, self.device)

    def _load_torch_export_aot_compile(self, model_so_path: str) -> Any:
        return model_files.load_aot(model_so_path, self.device)

    def _use_torch_export_aot_compile(self) -> bool:
        return is_compiled_ahead(getattr(self, "model_yaml_config", {}))

    def handle(self, data: Any, context: Context) -> Any:
        """Answers a batch: predictions, an explanation or a description, by what the first request asks for.

        Args:
            data: one dict a request, or what an envelope has made of it.
            context: of this batch.

        Returns:
            One answer a request.
        """
        began = time.perf_counter()
        self.context = context
        if self.manifest is None:
            self.manifest = context.manifest
        if self._is_describe():
            output: Any = [self.describe_handle()]
        elif os.environ.get("ENABLE_TORCH_PROFILER"):
            output, _ = self._infer_with_profiler(data=data)
        else:
            inputs = self.preprocess(data)
            explain = self._is_explain()
            output = self.explain_handle(inputs, data) if explain else self.postprocess(self.inference(inputs))
        metrics = getattr(context, "metrics", None)
        if metrics is not None:
            metrics.add_time("HandlerTime", round((time.perf_counter() - began) * 1000, 2), None, "ms")
        return output

    @timed
    def preprocess(self, data: Any) -> Any:
        """Turns the requests into what `inference` takes: here rows of numbers into a tensor."""
        return torch.as_tensor(data, device=self.device)

    @timed
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model without autograd."""
        with torch.inference_mode():
            return self.model(data.to(self.device), *args, **kwargs)

    @timed
    def postprocess(self, data: Any) -> Any:
        """Turns what the model gave into one answer a request: here a tensor into lists."""
        return data.tolist()

    def explain_handle(self, data_preprocess: Any, raw_data: Any) -> Any:
        """Explains the first request's prediction, or that of its field `target`.

        Args:
            data_preprocess: what `preprocess` gave.
            raw_data: the requests.

        Returns:
            One answer a request.
        """
        row = raw_data[0]
        inputs = (row.get("data") or row.get("body")) if isinstance(row, dict) else None
        return self.get_insights(data_preprocess, inputs, target_of(row))

    def get_insights(self, tensor_data: Any, _: Any, target: Any = 0) -> Any:
        """How much each input counts for the class `target`, by integrated gradients: lists in the shape of the input.

        Raises:
            PredictionException: with status 501: captum is not installed.
        """
        gradients = captum_class("IntegratedGradients")(self.model)
        return gradients.attribute(tensor_data, target=target, n_steps=15).tolist()

    def describe_handle(self) -> Any:
        """What the management API adds to the model's description when it is asked for the handler's own; here nothing."""
        return None

    def get_device(self) -> Any:
        """Where the model is."""
        return self.device

    def _infer_with_profiler(self, data: Any) -> tuple[Any, Any]:
        return run_profiled(self, data)

    def _is_explain(self) -> bool:
        self.explain = self._asks_for("explain")
        return self.explain

    def _is_describe(self) -> bool:
        return self._asks_for("describe")

    def _asks_for(self, what: str) -> bool:
        return bool(self.context) and self.context.get_request_header(0, what) == "True"
