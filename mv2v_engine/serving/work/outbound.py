"""Requests that the service makes for its clients, to hosts that it was started with alone.

A client names the URL, so nothing but the list decides where it goes: no redirect is followed, no
proxy of the environment is used, and the address that was checked is the one that is connected to,
whatever the name resolves to a moment later. Addresses that are not public are refused unless the
list names them, as `10.1.2.3` or `10.0.0.0/8`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from mv2v_engine.errors import RequestError
from mv2v_engine.serving.errors import ApiError

if TYPE_CHECKING:
    import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_URL = 2000
_PORTS = {"http": 80, "https": 443}
# addresses of IPv6 that a gateway turns into others of IPv4
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")))


class RefusedError(Exception):
    """A URL that the list does not allow, or a host that does not answer as it should."""


class Hosts:
    """The hosts that may be asked.

    listed: `name`, `name:port`, an address, `address:port`, or a network of addresses that names
    may resolve to. Without a port, the scheme's own is meant.

    Raises:
        RequestError: an entry is none of these.
    """

    def __init__(self, listed: Sequence[str]) -> None:
        self._names: set[tuple[str, int | None]] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        # names are resolved apart from all other work: a resolver may hang
        self._resolver = ThreadPoolExecutor(2, thread_name_prefix="resolver")
        for entry in listed:
            try:
                if "/" in entry:
                    self._networks.append(ipaddress.ip_network(entry))
                    continue
                parts = urlsplit(f"//{entry}")
                host, port = parts.hostname, parts.port
                if not host or parts.path or parts.username is not None:
                    raise ValueError("no host")
            except ValueError as error:
                raise RequestError(
                    f"{entry!r} is no host ({error}); write example.org, example.org:8443, "
                    "10.1.2.3 or 10.0.0.0/8"
                ) from error
            self._names.add((host, port))
            if (address := _literal(host)) is not None:
                self._networks.append(ipaddress.ip_network(address))

    def check(self, url: str, field: str) -> str:
        """A URL whose host is on the list; what it resolves to is looked at when it is asked.

        Raises host_not_allowed. field: of the request, for the error.
        """
        try:
            self._parts(url)
        except RefusedError as error:
            raise ApiError("host_not_allowed", f"{field}: {error}", param=field) from error
        return url

    def _parts(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise RefusedError(f"no URL ({error})") from error
        host = parts.hostname
        if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
            raise RefusedError(f"a URL of at most {MAX_URL} visible ASCII characters is expected")
        if parts.scheme not in _PORTS or not host:
            raise RefusedError("an http or https URL is expected")
        if parts.username is not None or parts.password is not None:
            raise RefusedError("a URL with a user's name in it is not taken")
        plain = port in (None, _PORTS[parts.scheme])
        if (host, port) not in self._names and not (plain and (host, None) in self._names):
            raise RefusedError(
                f"the service asks no host {host[:100]!r}"
                + ("" if plain else f" on port {port}")
                + "; whoever runs it can list it"
            )
        return parts

    async def _address(self, host: str, port: int) -> Address:
        """What a host resolves to, if all of it may be asked."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._resolver, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM
            )
        except OSError as error:
            raise RefusedError(f"{host} is not found") from error
        addresses = [
            _plain(ipaddress.ip_address(str(row[4][0]).partition("%")[0])) for row in found
        ]
        for address in addresses:
            is_listed = any(address in network for network in self._networks)
            if not is_listed and not _is_public(address):
                raise RefusedError(f"{host} is an address that is not public")
        return addresses[0]

    @asynccontextmanager
    async def request(
        self, method: str, url: str, *, seconds: float, **how: Any
    ) -> AsyncIterator[httpx.Response]:
        """The answer to one request, its body still to be read.

        seconds: for the answer to begin, from the name's resolving on, and for each part behind it.

        Raises:
            RefusedError: the list does not allow it, or no answer came.
        """
        import httpx

        parts = self._parts(url)
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        try:
            address = await asyncio.wait_for(self._address(host, port), seconds)
            place = httpx.URL(url).copy_with(host=str(address), fragment=None)
            headers = {"Host": parts.netloc, "User-Agent": "mv2v_engine", **how.pop("headers", {})}
            async with httpx.AsyncClient(
                trust_env=False, follow_redirects=False, timeout=seconds
            ) as client:
                request = client.build_request(method, place, headers=headers, **how)
                # the certificate is to be the name's, not the address's
                request.extensions["sni_hostname"] = host
                answer = await asyncio.wait_for(client.send(request, stream=True), seconds)
                try:
                    yield answer
                finally:
                    await answer.aclose()
        except asyncio.TimeoutError as error:
            raise RefusedError(f"{host} did not answer within {seconds:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RefusedError(f"{host} did not answer: {type(error).__name__}") from error

    async def download(self, url: str, path: Path, most: int, *, seconds: float) -> None:
        """Write what a URL gives into a file.

        most: bytes. seconds: for each part.

        Raises:
            RefusedError: the list does not allow it, or it is not given whole.
            ApiError: too_large.
            OSError: the disk does not take it.
        """
        headers = {"Accept-Encoding": "identity"}  # what is limited is what is written
        async with self.request("GET", url, seconds=seconds, headers=headers) as answer:
            if answer.status_code != 200:
                raise RefusedError(f"it answered with status {answer.status_code}, not 200")
            written = 0
            with await asyncio.to_thread(open, path, "wb") as file:
                async for part in answer.aiter_raw(1 << 20):
                    written += len(part)
                    if written > most:
                        raise ApiError(
                            "too_large",
                            f"the file of the URL has more than {most} bytes, which is the most "
                            "that is taken; cut it, or encode it smaller",
                        )
                    await asyncio.to_thread(file.write, part)

    def close(self) -> None:
        """Let go of the resolver."""
        self._resolver.shutdown(wait=False, cancel_futures=True)


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped if mapped is not None else address


def _is_public(address: Address) -> bool:
    is_translated = any(address in network for network in _TRANSLATED)
    return address.is_global and not address.is_multicast and not is_translated
