"""What a process does that it should not: every connection, and every look at a file that nobody should see."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

_real_getaddrinfo = socket.getaddrinfo


def watch(log: Path, *, ports: Collection[int], secrets: Collection[str]) -> None:
    """From now on, and in processes forked off: a line in ``log`` for each forbidden thing that is tried.

    Connections may go to this machine's ``ports``. Public addresses are refused here, so that nothing leaves this
    machine, and noted as ``public``, which is no offence. ``secrets`` are files and folders that nobody may open.
    """
    busy = False

    def note(line: str) -> None:
        nonlocal busy
        busy = True
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.write(line.replace("\n", " ") + "\n")
        finally:
            busy = False

    def see(event: str, arguments: Sequence[Any]) -> None:
        if busy:
            return
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            host, port = arguments[1][:2]
            if host in ("127.0.0.1", "::1") and port in ports:
                return
            is_public = ipaddress.ip_address(str(host).partition("%")[0]).is_global
            note(f"{'public' if is_public else 'FORBIDDEN connect'} {host} {port}")
            raise ConnectionRefusedError("not from a test")
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if any(path == secret or path.startswith(f"{secret}/") for secret in secrets):
                note(f"FORBIDDEN open {path}")
        elif event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn"):
            note(f"FORBIDDEN {event} {arguments!r:.200}")

    sys.addaudithook(see)


def answer_names(names: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Look up these names here: at first the first list of addresses, then the second, and so on, then the last."""
    asked: dict[str, int] = {}

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        answers = names.get(name.lower().rstrip("."))
        if answers is None:
            return _real_getaddrinfo(host, port, *args, **kwargs)
        turn = asked[name] = asked.get(name, -1) + 1
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in answers[min(turn, len(answers) - 1)]
        ]

    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]
