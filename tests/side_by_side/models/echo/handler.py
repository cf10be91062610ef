"""Says what a handler sees: the parts with their types, the headers, the context."""

import os


def shown(value):
    """A value with its type; JSON as it is."""
    return {"type": type(value).__name__, "value": value.decode("latin-1") if isinstance(value, bytearray) else value}


def handle(data, context):
    """A function handler; the call without data is TorchServe's initialisation."""
    if data is None:
        return None
    answers = []
    for index, parts in enumerate(data):
        context.set_response_content_type(index, "application/json")
        headers = context.get_all_request_header(index)
        answers.append(
            {
                "parts": {name: shown(value) for name, value in sorted(parts.items())},
                "headers": {
                    name: headers[name]
                    for name in sorted(headers)
                    if name in ("url_path", "explain", "describe", "body", "X-Own", "file", "text")
                },
                "missing": context.get_request_header(index, "x-not-there"),
                "model": context.model_name,
                "manifest": sorted(context.manifest["model"]),
                "version": context.manifest["model"]["modelVersion"],
                "yaml": context.model_yaml_config,
                "properties": {
                    name: context.system_properties[name]
                    for name in ("gpu_id", "batch_size", "server_name", "limit_max_image_pixels")
                },
                "here": sorted(name for name in os.listdir() if name != "__pycache__"),
                "request id": len(context.get_request_id(index)),
            }
        )
    return answers
