"""Whether a request, as it went over the wire, is one that a service's OpenAPI allows.

A generator's word is not enough: what it spoils may be another good request once it is sent. What
is not said in the schema, such as unknown query parameters and headers, is allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from email import policy
from email.parser import BytesParser
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import requests
from jsonschema import Draft202012Validator

_TEXTUAL = re.compile(r"\{\w+\}")


class Contract:
    """schema: the service's `/openapi.json`."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._components = schema["components"]
        self._paths = [
            (re.compile(_TEXTUAL.sub("([^/]+)", path)), re.findall(r"\{(\w+)\}", path), operations)
            for path, operations in schema["paths"].items()
        ]

    def allows(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> bool:
        """headers: their names in lower case."""
        target = urlsplit(url)
        for pattern, names, operations in self._paths:
            match = pattern.fullmatch(target.path)
            operation = operations.get(method.lower())
            if match is not None and operation is not None:
                path = dict(zip(names, map(unquote, match.groups()), strict=True))
                query = dict(parse_qsl(target.query, keep_blank_values=True))
                found = {"path": path, "query": query, "header": headers}
                if self._parameters_fit(operation, found):
                    return self._body_fits(operation, headers.get("content-type", ""), body)
        return False

    def _parameters_fit(
        self, operation: Mapping[str, Any], found: Mapping[str, Mapping[str, str]]
    ) -> bool:
        for parameter in operation.get("parameters", ()):
            name = parameter["name"]
            values = found.get(parameter["in"], {})
            text = values.get(name.lower() if parameter["in"] == "header" else name)
            if text is None:
                if parameter.get("required"):
                    return False
            elif not self._text_fits(text, parameter["schema"]):
                return False
        return True

    def _body_fits(self, operation: Mapping[str, Any], kind: str, body: bytes) -> bool:
        expected = operation.get("requestBody")
        if expected is None:
            return True
        if not body:
            return not expected.get("required", False)
        content = expected["content"].get(kind.partition(";")[0].strip().lower())
        if content is None:
            return False
        if "json" in kind:
            try:
                value = json.loads(body.decode(), parse_constant=_refuse)
            except (ValueError, RecursionError):
                return False
            return self._fits(value, content["schema"])
        fields = form_fields(kind, body)
        return fields is not None and self._form_fits(fields, content["schema"])

    def _form_fits(self, fields: Mapping[str, str], schema: Mapping[str, Any]) -> bool:
        schema = self._resolved(schema)
        known = schema.get("properties", {})
        if set(schema.get("required", ())) - set(fields):
            return False
        if schema.get("additionalProperties") is False and set(fields) - set(known):
            return False
        return all(self._text_fits(fields[name], known[name]) for name in set(fields) & set(known))

    def _text_fits(self, text: str, schema: Mapping[str, Any]) -> bool:
        """Whether one of the values that a text can stand for is allowed."""
        values: list[Any] = [text]
        with suppress(ValueError, RecursionError):
            values.append(json.loads(text, parse_constant=_refuse))
        return any(self._fits(value, schema) for value in values)

    def _fits(self, value: Any, schema: Mapping[str, Any]) -> bool:
        whole = {**schema, "components": self._components}
        return bool(Draft202012Validator(whole).is_valid(value))

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        if "$ref" not in schema:
            return schema
        found: Mapping[str, Any] = self._components["schemas"][schema["$ref"].split("/")[-1]]
        return found


def allows_sent(contract: Contract, sent: requests.PreparedRequest) -> bool:
    """Whether a request that was sent is one that the contract allows."""
    assert sent.method is not None and sent.url is not None
    headers = {name.lower(): _text(value) for name, value in sent.headers.items()}
    return contract.allows(sent.method, sent.url, headers, body_of(sent))


def body_of(sent: requests.PreparedRequest) -> bytes:
    body = sent.body
    return body if isinstance(body, bytes) else (body or "").encode()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


Parts = tuple[str, str, dict[str, str], bytes]


def whole_request(data: bytes) -> Parts | None:
    """The method, target, headers and body of one whole HTTP/1.1 request, if bytes are one."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    connection.receive_data(b"")
    request, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return None
    except h11.RemoteProtocolError:
        return None
    assert request is not None
    headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
    return request.method.decode(), request.target.decode("latin-1"), headers, body


def form_fields(kind: str, body: bytes) -> dict[str, str] | None:
    """The fields of a multipart body; a file's bytes as Latin-1. None if it is no whole form."""
    head = f"Content-Type: {kind}\r\n\r\n".encode()
    message = BytesParser(policy=policy.HTTP).parsebytes(head + body)
    if not message.is_multipart() or message.defects:
        return None
    fields = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            return None
        payload = part.get_payload(decode=True)
        fields[name] = payload.decode("latin-1") if isinstance(payload, bytes) else ""
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")
