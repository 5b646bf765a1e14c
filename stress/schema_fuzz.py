"""Requests that schemathesis makes of a service's own OpenAPI: good ones, and ones that are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# it cannot be told from a request what these would remove
_REMOVING = ("/cancel",)
Answered = Callable[[schemathesis.Case, schemathesis.Response], None]


def fuzz_schema(
    address: str,
    known: Mapping[str, str],
    on_answer: Answered,
    *,
    modes: Mapping[GenerationMode, int],
    timeout: float,
    start: int = 0,
) -> None:
    """Send requests to every operation and check that the answers are as the schema says.

    Args:
        known: path parameters that name something real, for all that do not remove it.
        modes: how many requests of each kind an operation gets. start: of the random numbers.
        timeout: seconds that an answer may take.

    Raises:
        FailureGroup: an answer is not as the schema says.
    """
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", timeout=timeout)
    for found in schema.get_all_operations():
        operation = found.ok()
        is_removing = operation.method == "delete" or operation.path.endswith(_REMOVING)
        named = {name: value for name, value in known.items() if f"{{{name}}}" in operation.path}
        for mode, count in modes.items():
            fixed: dict[str, Any] | None = None if is_removing else named or None
            strategy = operation.as_strategy(mode, path_parameters=fixed)

            @seed(start)
            @settings(
                max_examples=count,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def send(case: schemathesis.Case) -> None:
                answer = case.call(timeout=timeout)
                on_answer(case, answer)
                case.validate_response(answer, checks=CHECKS)

            try:
                send()
            except Unsatisfiable:
                # an operation without parameters has no malformed request
                if mode is not GenerationMode.NEGATIVE:
                    raise
