"""The description of the server, judged by others' tools."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from server_running import Running


def test_the_description_is_valid_and_of_every_route(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    OpenAPIV31SpecValidator(document).validate()
    routes = {(route.path.replace(":path", ""), method) for route in server.app.routes for method in route.methods}
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described == {(path, method) for path, method in routes if method != "HEAD"}
    operations: list[dict[str, Any]] = [o for methods in document["paths"].values() for o in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(
        "requestBody" in methods["post"]
        for path, methods in document["paths"].items()
        if "post" in methods and not path.endswith("/cancel")  # has no body
    )


def test_a_field_is_described_as_it_is_read(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert {"type": "integer"} in schema["properties"]["max_tokens"]["anyOf"]
    parameters = document["paths"]["/v1/responses/{id}/input_items"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["id", "limit", "order", "after"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_whatever_is_sent_no_request_makes_the_server_fail(server: Running) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    n_cases = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            # the same cases in every run, so that a failure belongs to the change that brings it
            @settings(
                max_examples=200,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal n_cases
                n_cases += 1
                case.call_and_validate(checks=[not_a_server_error])

            with suppress(Unsatisfiable):  # where nothing is sent, nothing wrong can be
                ask()
    assert n_cases >= 5000
