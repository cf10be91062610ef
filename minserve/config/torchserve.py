"""TorchServe's side of the server options: its keys, its environment and its defaults (torchserve.md 6)."""

from __future__ import annotations

# Where TorchServe's defaults are not those of `minserve start`.
DEFAULTS: dict[str, object] = {
    "load_models": [],
    "disable_token_authorization": False,
    "metrics_mode": "log",
    "lenient": True,
}
# Keys of TorchServe for parts that minserve has not, or has nothing to set in.
WITHOUT_EFFECT = frozenset(
    {
        *("async_logging", "cpp_log_config", "cpu_launcher_args", "cpu_launcher_enable", "debug", "enable_grpc_ssl"),
        *("grpc_inference_address", "grpc_inference_port", "grpc_management_address", "grpc_management_port"),
        *("grpc_inference_max_connection_age_ms", "grpc_inference_max_connection_age_grace_ms"),
        *("grpc_management_max_connection_age_ms", "grpc_management_max_connection_age_grace_ms"),
        *("initial_distribution_port", "initial_worker_port", "io_ratio", "ipex_enable", "ipex_gpu_enable"),
        *("model_server_home", "netty_client_threads", "number_of_netty_threads", "plugins_path"),
        *("prefer_direct_buffer", "python", "ts_header_key_sequence_end", "ts_header_key_sequence_id"),
        *("ts_header_key_sequence_start", "ts_open_inference_protocol", "use_native_io", "vmargs", "workflow_store"),
        *("NUM_WORKERS", "tsConfigFile", "version"),  # TorchServe's own notes in its snapshots
    }
)
READ_HERE = frozenset({"enable_envvars_config", "use_env_allowed_urls"})
# Options for which TorchServe reads the environment, if it is told to; the variable is TS_ and the key in capitals.
FROM_ENVIRONMENT = frozenset(
    {
        *("allowed_urls", "blacklist_env_vars", "certificate_file", "cors_allowed_headers", "cors_allowed_methods"),
        *("cors_allowed_origin", "decode_input_request", "default_response_timeout", "default_service_handler"),
        *("default_startup_timeout", "default_workers_per_model", "disable_system_metrics"),
        *("disable_token_authorization", "enable_metrics_api", "enable_model_api", "inference_address"),
        *("install_py_dep_per_model", "job_queue_size", "keystore", "keystore_pass", "keystore_type"),
        *("limit_max_image_pixels", "load_models", "management_address", "max_request_size", "max_response_size"),
        *("metrics_address", "metrics_config", "metrics_mode", "model_metrics_auto_detect", "model_store"),
        *("number_of_gpu", "private_key_file", "service_envelope", "token_expiration_min", "unregister_model_timeout"),
    }
)
_OTHER_NAMES = {"token_expiration_min": "TS_TOKEN_EXPIRATION_TIME_MIN"}


def environment_name(option: str) -> str | None:
    """The variable for an option; None if TorchServe reads none."""
    return _OTHER_NAMES.get(option, f"TS_{option.upper()}") if option in FROM_ENVIRONMENT else None
