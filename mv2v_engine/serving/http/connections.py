"""Connections before they are requests: how many there may be, and how long a header may take.

A client that connects has shown no token yet, so nothing here may cost much, or last.
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

# seconds from a header's first byte, or from the connection's beginning, to the header's end
HEADER_SECONDS = 10.0
# seconds that a client that is refused waits before it tries again
_RETRY = {"Retry-After": "5"}


class Places:
    """How many connections there may be, and who has to go for a new one.

    A new one takes the place of the one that has waited longest without a request under way, of
    the address that has most of these. Where all have a request under way, it is refused. An
    address has half of the places at most, unless it is this machine's, as a proxy's is.

    Whoever floods the service with connections pays for each more than this does: no step looks
    at all of them.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._num_open: Counter[str] = Counter()
        self._total = 0
        # each address's connections, those that have waited longest first
        self._waiting: dict[str, dict[BoundedConnection, None]] = {}

    def enter(self, connection: BoundedConnection) -> bool:
        """Whether there is a place for a new connection; it is counted until it leaves."""
        address, has_place = connection.address, True
        if self._total >= self.most:
            # among addresses with equally many, the one that has waited longest is first
            crowd = max(map(len, self._waiting.values()), default=0)
            crowded = (one for one, held in self._waiting.items() if len(held) == crowd)
            has_place = self._take_from(next(crowded, None))
        elif not _is_local(address) and self._num_open[address] >= max(1, self.most // 2):
            has_place = self._take_from(address)
        self._total += 1
        self._num_open[address] += 1
        return has_place

    def leave(self, connection: BoundedConnection) -> None:
        """A connection has ended."""
        self.works(connection)
        self._total -= 1
        self._num_open[connection.address] -= 1
        if not self._num_open[connection.address]:
            del self._num_open[connection.address]

    def waits(self, connection: BoundedConnection) -> None:
        """A connection has no request under way, from now on or still."""
        self._waiting.setdefault(connection.address, {}).setdefault(connection)

    def works(self, connection: BoundedConnection) -> None:
        """A connection has a request under way."""
        held = self._waiting.get(connection.address, {})
        held.pop(connection, None)
        if not held:
            self._waiting.pop(connection.address, None)

    def _take_from(self, address: str | None) -> bool:
        """End the connection of an address that has waited longest; False if it has none."""
        longest = next(iter(self._waiting.get(address or "", ())), None)
        if longest is None:
            return False
        self.works(longest)
        # not closed in order: that would wait for a client to take the rest of its last answer
        longest.transport.abort()
        return True


class BoundedConnection(H11Protocol):
    """A connection that takes one of the `Places`, to be made by uvicorn."""

    def __init__(self, *args: Any, places: Places, header_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places, self._header_seconds = places, header_seconds
        self._late: asyncio.TimerHandle | None = None
        self._is_upgraded = False
        # whether something of the next request has come
        self._has_begun = False
        # where it comes from, without the port
        self.address = ""

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way."""
        if self._is_upgraded:
            return False
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room, or refuse; then what uvicorn does."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if self._places.enter(self):
            self._places.waits(self)
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
        """Forget the header under way; then what uvicorn does."""
        self._forget_header()
        self._places.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, within the time that a header has from its first byte to its last."""
        if self.transport.is_closing():
            return
        if self.is_waiting:
            self._has_begun = True
            if self._late is None:
                self._expect_header()
        super().data_received(data)
        if not self.is_waiting:
            self._places.works(self)
            self._forget_header()

    def handle_websocket_upgrade(self, event: Any) -> None:
        """Hand the connection over; its place is kept until it ends."""
        super().handle_websocket_upgrade(event)
        self._is_upgraded = True
        protocol: Any = self.transport.get_protocol()
        lost = protocol.connection_lost

        def connection_lost(error: Exception | None) -> None:
            self._places.leave(self)
            lost(error)

        protocol.connection_lost = connection_lost

    def on_response_complete(self) -> None:
        """End an answer; from now on the connection waits for the next request."""
        self._has_begun = False
        super().on_response_complete()
        if self.is_waiting and self in self.connections:
            self._places.waits(self)

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
