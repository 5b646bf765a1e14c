"""Connections before they are requests: how many there may be, and how long a header may take.

Who connects has shown no token yet, so nothing here may cost much, or last.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from ipaddress import ip_address
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mv2v_engine.serving.errors import ApiError

# from the first byte that could be of a header, or the connection, to the header's end
HEADER_SECONDS = 10.0
# what a client that is refused waits before it tries again
_RETRY = {"Retry-After": "5"}


class BoundedConnection(H11Protocol):
    """One connection of `max_connections`, to be made by uvicorn.

    A new one takes the place of the one that has waited longest without a request under way, of
    the address that has most of these. Where all have a request under way, it is refused. An
    address has half of the places at most, unless it is this machine's, as a proxy's is.
    """

    def __init__(
        self, *args: Any, max_connections: int, header_seconds: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._most, self._header_seconds = max_connections, header_seconds
        self._late: asyncio.TimerHandle | None = None
        # when it began to wait for a request, and whether something of one has come
        self._waits_since, self._has_begun = self.loop.time(), False

    @property
    def address(self) -> str:
        """Where it comes from, without the port."""
        return self.client[0] if self.client else ""

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn; makes room first, or refuses."""
        super().connection_made(transport)
        if self._make_room():
            self._expect_header()
        else:
            self._refuse(
                ApiError(
                    "too_many_connections",
                    "as many connections are open as may be, and each has a request under way; "
                    f"try again in {_RETRY['Retry-After']} s",
                    headers=_RETRY,
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn."""
        self._forget_header()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As uvicorn, within the time that a header has from its first byte to its last."""
        if self.transport.is_closing():
            return
        if self.is_waiting:
            self._has_begun = True
            if self._late is None:
                self._expect_header()
        super().data_received(data)
        if not self.is_waiting:
            self._forget_header()

    def on_response_complete(self) -> None:
        """As uvicorn; from now on it waits for the next request."""
        self._waits_since, self._has_begun = self.loop.time(), False
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP is refused as everything else is."""
        self._refuse(ApiError("malformed_request", f"{msg.rstrip('.')}; send HTTP/1.1"))

    def _expect_header(self) -> None:
        self._late = self.loop.call_later(self._header_seconds, self._header_is_late)

    def _forget_header(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _header_is_late(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if not self._has_begun or self.cycle is not None:
            # it has said nothing, or has had an answer and sends on what nobody reads
            self.transport.close()
            return
        seconds = f"{self._header_seconds:g}"
        message = f"the header did not end within {seconds} s; send it whole"
        self._refuse(ApiError("request_timeout", message))

    def _make_room(self) -> bool:
        """Whether there is a place for this connection; one that waits may lose its own."""
        others = [
            other
            for other in self.connections
            if isinstance(other, BoundedConnection)
            and other is not self
            and not other.transport.is_closing()
        ]
        crowd = others
        if len(others) < self._most:
            crowd = [other for other in others if other.address == self.address]
            if _is_local(self.address) or len(crowd) < max(1, self._most // 2):
                return True
        waiting = [other for other in crowd if other.is_waiting]
        if not waiting:
            return False
        held = Counter(other.address for other in waiting)
        longest = min(waiting, key=lambda other: (-held[other.address], other._waits_since))
        longest.transport.close()
        return True

    def _refuse(self, error: ApiError) -> None:
        """Answer before there is a request, and close."""
        self._forget_header()
        body = json.dumps(error.to_dict()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        headers |= {"Connection": "close", **error.headers}
        response = h11.Response(
            status_code=error.status,
            headers=list(headers.items()),
            reason=STATUS_PHRASES[error.status],
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _is_local(address: str) -> bool:
    """Whether an address is this machine's own; a socket without one is too."""
    try:
        return not address or ip_address(address).is_loopback
    except ValueError:
        return False
