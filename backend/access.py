"""Who may ask: user and password, the webhooks' secret, how often an address may guess, and what browsers may do."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable

from flask import Flask, Response, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import TooManyRequests, Unauthorized

from .client import SECRET_HEADER
from .settings import Settings

OPEN_ENDPOINTS = frozenset({"health", "tiles"})
"""Label Studio asks for health without a password, and browsers for tiles."""

GUESSES = 10
"""Wrong passwords that an address may send in a row."""

GUESS_EVERY_S = 6.0
"""After those, it gets one more for each so many seconds."""

KNOWN_FOR_S = 3600.0
"""So long after a right password an address is not locked out for wrong ones, in seconds."""

_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)


class Guesses:
    """Wrong passwords by address, in memory that processes forked after its making share; its size never changes.

    An address that sent the right password lately is never locked out, so that whoever shares it with Label Studio,
    behind a proxy, say, cannot keep that out. An address of which nothing right ever came is locked out whatever it
    sends: otherwise guessing on would pay. Two processes that count at the same moment may lose one count.
    """

    _SLOT = struct.Struct("<Qddd")
    """Tag of the address; wrong passwords, as of when, and when the last right one came, in monotonic seconds."""

    _WAYS = 8

    def __init__(self, sets: int = 1024, *, now: Callable[[], float] = time.monotonic) -> None:
        """Room for 8 addresses in each of ``sets``; the one heard of longest ago makes place."""
        self._sets = sets
        self._memory = mmap.mmap(-1, sets * self._WAYS * self._SLOT.size)
        self._key = os.urandom(16)
        self._now = now
        self._lock = threading.Lock()

    def wait_s(self, address: str) -> float:
        """How long the address has to wait before its next guess, in seconds; 0 for none."""
        with self._lock:
            _, _, count, _, right = self._find(address)
        is_known = right > 0 and self._now() - right < KNOWN_FOR_S
        return 0.0 if is_known else max(0.0, (count - GUESSES + 1) * GUESS_EVERY_S)

    def wrong(self, address: str) -> None:
        """Count a wrong password."""
        with self._lock:
            at, tag, count, now, right = self._find(address)
            self._SLOT.pack_into(self._memory, at, tag, min(count + 1.0, 2.0 * GUESSES), now, right)

    def right(self, address: str) -> None:
        """Note a right password."""
        with self._lock:
            at, tag, count, now, right = self._find(address)
            if now - right > 1.0 or not right:
                self._SLOT.pack_into(self._memory, at, tag, count, now, now)

    def _find(self, address: str) -> tuple[int, int, float, float, float]:
        """Place of the address's slot, its tag, how many wrong passwords count now, now, and the last right one."""
        digest = hashlib.blake2b(_network_of(address).encode(), key=self._key, digest_size=16).digest()
        tag = int.from_bytes(digest[:8]) | 1
        first = int.from_bytes(digest[8:]) % self._sets * self._WAYS
        now = self._now()
        places = [(first + way) * self._SLOT.size for way in range(self._WAYS)]
        slots = [(at, *self._SLOT.unpack_from(self._memory, at)) for at in places]
        for at, found, count, when, right in slots:
            if found == tag:
                return at, tag, max(0.0, count - (now - when) / GUESS_EVERY_S), now, right
        return min(slots, key=lambda slot: slot[3])[0], tag, 0.0, now, 0.0


def guard(app: Flask, settings: Settings, guesses: Guesses, *, starts_training: Callable[[], bool]) -> None:
    """Basic auth on all routes but health and tiles, and a secret for webhooks, where they are set.

    ``starts_training`` tells whether the request is Label Studio's START_TRAINING, which comes by the backend's
    connection and so without the webhook's secret.
    """
    user, password = settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()
    secret = settings.webhook_secret.get_secret_value()

    def same(given: str | None, wanted: str) -> bool:
        return bool(wanted) and hmac.compare_digest((given or "").encode(), wanted.encode())

    def is_right() -> bool:
        # Name and password are both compared every time, so that the time taken tells nothing.
        given = request.authorization
        name_fits = same(given.username if given else None, user)
        password_fits = same(given.password if given else None, password)
        has_secret = request.endpoint == "webhook" and same(request.headers.get(SECRET_HEADER), secret)
        return (settings.has_basic_auth and name_fits and password_fits) or has_secret

    def is_open() -> bool:
        if settings.has_basic_auth:
            return False
        return request.endpoint != "webhook" or not secret or starts_training()

    @app.before_request
    def check() -> None:
        if request.endpoint in OPEN_ENDPOINTS or not (settings.has_basic_auth or secret):
            return
        address = request.remote_addr or ""
        is_guess = "Authorization" in request.headers or SECRET_HEADER in request.headers
        wait_s = guesses.wait_s(address) if is_guess else 0.0
        if wait_s:
            raise TooManyRequests("too many wrong passwords from this address", retry_after=math.ceil(wait_s))
        if is_right():
            guesses.right(address)
        elif not is_open():
            if is_guess:
                guesses.wrong(address)
            raise Unauthorized(
                "user or password is missing or wrong (BASIC_AUTH_USER, BASIC_AUTH_PASS)",
                www_authenticate=WWWAuthenticate("basic", {"realm": "GeoPrelabel"}),
            )


def restrain_browsers(app: Flask) -> None:
    """No page of ours runs scripts, loads from elsewhere, is framed, or is taken for what it is not."""

    @app.after_request
    def add_headers(answer: Response) -> Response:
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers.setdefault("Content-Security-Policy", _PAGE_POLICY)
        answer.headers["Referrer-Policy"] = "no-referrer"
        answer.headers["X-Frame-Options"] = "DENY"
        if request.endpoint not in OPEN_ENDPOINTS:
            # What stands behind a password is not for the caches on the way.
            answer.headers["Cache-Control"] = "no-store"
        return answer


def _network_of(address: str) -> str:
    """What counts as one address: of IPv6 the 64 bits that a customer is given."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
