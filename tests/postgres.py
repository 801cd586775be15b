"""A real PostgreSQL for a while, on this machine alone."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.label_studio import free_port


def its_user() -> str | None:
    """Whom it is to run as, which is not root; None for whoever this process runs as. Skips where there is nobody."""
    if os.geteuid() != 0:
        return None
    named = [entry.pw_name for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody")]
    if not named:
        pytest.skip("PostgreSQL does not run as root, and there is no other user")
    return named[-1]


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """The URL of its database; skips where there is no PostgreSQL, or nobody it would run as."""
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'psycopg[binary]'")
    if not all(shutil.which(program) for program in ("initdb", "postgres")):
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    user = its_user()
    # A socket's path must be short.
    data, port = Path(tempfile.mkdtemp(prefix="geoprelabel-pg-", dir="/tmp")), free_port()
    process = None
    try:
        if user:
            shutil.chown(data, user)
        initdb = ["initdb", "-D", f"{data}/db", "-U", "postgres", "-A", "trust", "-N"]
        subprocess.run(initdb, user=user, check=True, capture_output=True, cwd="/")
        serve = ["postgres", "-D", f"{data}/db", "-p", str(port), "-k", str(data), "-h", "127.0.0.1", "-c", "fsync=off"]
        process = subprocess.Popen(serve, user=user, stderr=subprocess.DEVNULL, cwd="/")
        import psycopg

        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        for _ in range(300):
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
                break
            time.sleep(0.1)
        yield url
    finally:
        if process is not None:
            # Fast: it does not wait until everybody has gone.
            process.send_signal(signal.SIGINT)
            process.wait(20)
        shutil.rmtree(data, ignore_errors=True)
