"""The JSON Schema of model-config.yaml, and the same schema in plain English for error messages."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from minserve.config.keys import LARGEST, ModelConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, object]:
    """Return the JSON Schema (draft 2020-12) of model-config.yaml, for editors.

    Keys that it does not name are allowed: an author's own sections stand beside minserve's.
    """
    schema = ModelConfig.model_json_schema(schema_generator=_Generator)
    for section in (schema, *schema["$defs"].values()):
        for key in section["properties"].values():
            key["description"] = " ".join(key["description"].split())
    return {"$schema": DIALECT, **schema, "title": "minserve: model-config.yaml"}


def allowed_values(model: type[BaseModel], key: str) -> str:
    """Say in English what a key of the model may have: `an integer >= 1`."""
    schema = model.model_json_schema(schema_generator=_Generator)
    return _describe(schema["properties"][key])


class _Generator(GenerateJsonSchema):
    """Pydantic's generator without what only tells of Python: null for a key left out, titles made of field names."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def _describe(schema: Mapping[str, object]) -> str:
    match schema:
        case {"title": str(title)}:
            return title
        case {"$ref": _}:
            return "a map"
        case {"anyOf": [*choices]}:
            return " or ".join(_describe(choice) for choice in choices if isinstance(choice, Mapping))
        case {"enum": [*values]}:
            return " or ".join(json.dumps(value) for value in values)
        case {"type": "integer", "minimum": low, "maximum": high} if high == LARGEST:
            return f"an integer >= {low}"
        case {"type": "integer", "minimum": low, "maximum": high}:
            return f"an integer from {low} to {high}"
        case {"type": "integer"}:
            return f"an integer >= {schema['minimum']}" if "minimum" in schema else "an integer"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "array"}:
            return "a list"
        case {"type": "object"}:
            return "a map"
        case _:
            return f"a {schema.get('type')}"
