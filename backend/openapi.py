"""What the routes take and answer, as OpenAPI 3.1: served at /openapi.json, and what the fuzzers begin from."""

from __future__ import annotations

from typing import Any

from . import __version__

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_CONFIG: Schema = {"type": "string", "description": "The project's label config, XML", "minLength": 1}
_PROJECT: Schema = {
    "type": ["string", "integer", "null"],
    "description": "Label Studio's <id>.<created at, in seconds since 1970>",
    "examples": ["3.1700000000"],
}
_EVENT_PROJECT: Schema = {
    "oneOf": [
        {"type": "object", "required": ["id"],
         "properties": {"id": {"type": "integer"}, "created_at": {"type": "string", "format": "date-time"}}},
        _PROJECT,
    ]
}  # fmt: skip
_ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
_POINTS: Schema = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
_RESULT: Schema = {
    "type": "object",
    "required": ["id", "type", "value", "from_name", "to_name"],
    "properties": {"id": _TEXT, "type": _TEXT, "from_name": _TEXT, "to_name": _TEXT,
                   "value": {"type": "object", "properties": {"points": _POINTS}}, "meta": _OBJECT},
}  # fmt: skip
_PREDICTION: Schema = {
    "type": "object",
    "required": ["result"],
    "properties": {"result": {"type": "array", "items": _RESULT}, "score": {"type": ["number", "null"]},
                   "model_version": _TEXT},
}  # fmt: skip
_PROMPT: Schema = {
    "type": "object",
    "properties": {
        "id": _TEXT, "type": {"enum": ["keypoint", "keypointlabels", "rectangle", "rectanglelabels", "brushlabels"]},
        "from_name": _TEXT, "to_name": _TEXT, "is_positive": {"type": "boolean"},
        "value": {"type": "object", "properties": {name: {"type": "number"} for name in ("x", "y", "width", "height")}},
    },
}  # fmt: skip
_TASK: Schema = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "id": {"type": "integer"},
        "data": {"type": "object", "description": "Holds the image's address, and `tile` where it has a place",
                 "properties": {"image": _TEXT, "tile": _OBJECT}},
    },
}  # fmt: skip


def document() -> dict[str, Any]:
    """The description of all routes."""
    health = _json_answer("It runs", {"status": _TEXT, "model_class": _TEXT, "version": _TEXT,
                                      "ready": {"type": "boolean"}})  # fmt: skip
    page = {"text/html": {"schema": _TEXT}}
    status = {**_json_answer("How everything stands; nothing secret")}
    status["content"] = {**status["content"], **page}
    versions = _json_answer("Names of model versions, newest first", {"versions": {"type": "array", "items": _TEXT}})
    noted = _json_answer("What was done", {"status": _TEXT})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "GeoPrelabel",
            "version": __version__,
            "description": "An ML backend of Label Studio. Every error has its sentence in the HTTP reason phrase too.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/": {"get": _route("root", "Health, or for browsers the status page",
                                {"200": {**health, "content": {**health["content"], **page}}})},
            "/health": {"get": _route("health", "Whether it runs; asks no password", {"200": health}, guarded=False)},
            "/status": {"get": _route("status", "How everything stands, as JSON or for browsers as a page",
                                      {"200": status})},
            "/metrics": {"get": _route("metrics", "Prometheus metrics", {
                "200": {"description": "Metrics", "content": {"text/plain": {"schema": _TEXT}}}})},
            "/openapi.json": {"get": _route("openapi", "This description", {"200": _json_answer("OpenAPI 3.1")})},
            "/setup": {"post": _route(
                "setup", "Check a project's label config, as Label Studio does before it connects",
                {"200": _json_answer("The live model version", {"model_version": _TEXT}), **_refusals(422, 503)},
                body={"type": "object", "properties": {"project": _PROJECT, "schema": {"type": ["string", "null"]}}})},
            "/predict": {"post": _route(
                "predict", "Polygons for tasks, or the answer to an annotator's clicks and boxes",
                {"200": _json_answer("One item a task, in order; an empty list for a task that failed", {
                    "results": {"type": "array", "items": {"anyOf": [_PREDICTION, {"type": "array", "maxItems": 0}]}},
                    "model_version": _TEXT}), **_refusals(403, 404, 422, 502, 503)},
                body={"type": "object", "required": ["tasks", "label_config"], "properties": {
                    "tasks": {"type": "array", "items": _TASK}, "project": _PROJECT, "label_config": _CONFIG,
                    "model_version": {"type": ["string", "null"]},
                    "params": {"type": ["object", "null"], "properties": {"context": {
                        "type": ["object", "null"],
                        "properties": {"result": {"type": "array", "items": _PROMPT}}}}}}})},
            "/versions": {
                "get": _route("versions", "Model versions of all projects", {"200": versions, **_refusals(503)}),
                "post": _route("versions_of", "Model versions of a project", {"200": versions, **_refusals(503)},
                               body={"type": "object", "properties": {"project": _PROJECT}}, is_body_required=False)},
            "/webhook": {"post": _route(
                "webhook", "An event of Label Studio's; with GEOPRELABEL_WEBHOOK_SECRET in X-GeoPrelabel-Secret",
                {"201": noted, **_refusals()},
                body={"type": "object", "required": ["action"], "properties": {
                    "action": {"type": "string", "examples": ["ANNOTATION_CREATED", "START_TRAINING"]},
                    "project": _EVENT_PROJECT, "task": _OBJECT, "annotation": _OBJECT}},
                security=[{"password": []}, {"webhook_secret": []}])},
            "/train": {"post": _route("train", "Train a project's model", {"201": noted, **_refusals()},
                                      body={"type": "object", "properties": {"project": _EVENT_PROJECT}})},
            "/tiles/{scene}/{tile}": {"get": {
                **_route("tiles", "An image that `ingest` made; asks for no password", {
                    "200": {"description": "The image", "content": {"image/*": {"schema": _TEXT}}},
                    "206": {"description": "The part of it that a Range asks for"},
                    "304": {"description": "The image that the client has is still the same"},
                    "403": {"description": "Not signed, where GEOPRELABEL_TILES_SECRET is set", **_content(_ERROR)},
                    "416": {"description": "A Range beyond its end", **_content(_ERROR)},
                    "503": {"description": "Made on demand, and cannot be made now", **_content(_ERROR)},
                    "404": {"description": "No such tile", **_content(_ERROR)}}, guarded=False),
                "parameters": [{"name": name, "in": "path", "required": True, "schema": {
                    "type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]*$"}} for name in ("scene", "tile")]}},
        },
        "components": {"securitySchemes": {
            "password": {"type": "http", "scheme": "basic", "description": "BASIC_AUTH_USER and BASIC_AUTH_PASS"},
            "webhook_secret": {"type": "apiKey", "in": "header", "name": "X-GeoPrelabel-Secret"}}},
    }  # fmt: skip


def _route(
    name: str,
    summary: str,
    answers: dict[str, Any],
    *,
    body: Schema | None = None,
    is_body_required: bool = True,
    guarded: bool = True,
    security: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    refused = {"description": "User or password is missing or wrong", **_content(_ERROR)}
    slowed = {"description": "Too many wrong passwords from this address; see Retry-After", **_content(_ERROR)}
    # Nothing is asked for where the operator has set no password: {}.
    return {
        "operationId": name,
        "summary": summary,
        "responses": {**answers, **({"401": refused, "429": slowed} if guarded else {})},
        "security": [*(security or [{"password": []}]), {}] if guarded else [],
        **({"requestBody": {"required": is_body_required, **_content(body)}} if body else {}),
    }


def _json_answer(description: str, properties: Schema | None = None) -> dict[str, Any]:
    required = {"required": list(properties), "properties": properties} if properties else {}
    return {"description": description, **_content({"type": "object", **required})}


def _content(schema: Schema) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _refusals(*statuses: int) -> dict[str, Any]:
    what = {
        400: "The body is not what the route takes",
        403: "The task's image is not fetched from there",
        404: "No such model version",
        413: "The body is too large",
        422: "The label config, or the task's image, cannot be used",
        502: "Label Studio does not answer, or refuses",
        503: "The model is not ready, or too much is asked at once",
    }
    return {str(status): {"description": what[status], **_content(_ERROR)} for status in (400, 413, *statuses)}
