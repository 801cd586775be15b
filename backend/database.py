"""The database that server processes share: a SQLite file in the data folder, or what GEOPRELABEL_DATABASE_URL names.

With a URL, servers on several machines share it too. Statements are such that SQLite and PostgreSQL both read them.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from .errors import BackendError
from .flight import IMPORTING
from .settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

WAIT_S = 30.0
"""For another process's write."""

PAUSE_S = 30.0
"""After a call that failed, those who must not wait are told so at once for so long."""

_SETUP_LOCK = 0x67656F70
"""A number of our own, for the lock under which PostgreSQL makes tables."""


class DatabaseError(BackendError):
    """The database is missing, full, damaged or not to be reached."""


class Database:
    """One database. May be shared by threads; processes that are forked make their own connections."""

    def __init__(self, settings: Settings, name: str = "journal.sqlite3") -> None:
        """Nothing is opened or written before the first use. ``name`` is that of the file where no URL is set."""
        self._url = settings.database_url.get_secret_value()
        self._path = settings.data_dir / name
        self._made: set[Sequence[str]] = set()
        self._paused_until = 0.0
        self._failure = ""

    @property
    def is_shared(self) -> bool:
        """Whether a URL names it, so that servers with other data folders may have it too."""
        return bool(self._url)

    @property
    def is_missing(self) -> bool:
        """Whether it is certain, without opening it, that nothing was ever written."""
        return not self._url and not self._path.exists()

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self.engine.dialect.name == "sqlite"

    def do(
        self,
        work: Callable[[Connection], Answer],
        *,
        tables: Sequence[str] = (),
        wait_s: float = WAIT_S,
        is_hasty: bool = False,
    ) -> Answer:
        """What ``work`` gives, in a `transaction`."""
        with self.transaction(tables=tables, wait_s=wait_s, is_hasty=is_hasty) as base:
            return work(base)

    @contextmanager
    def transaction(
        self, *, tables: Sequence[str] = (), wait_s: float = WAIT_S, is_hasty: bool = False
    ) -> Iterator[Connection]:
        """All that is done within, or nothing; ``tables`` are the statements that make what is needed.

        ``is_hasty`` fails at once where another call has failed of late. Raises DatabaseError.
        """
        if is_hasty and time.monotonic() < self._paused_until:
            raise DatabaseError(self._failure)
        try:
            SQLAlchemyError = load_library()  # noqa: N806
            if tables not in self._made:
                self._make(tables, wait_s)
            with self.engine.begin() as base:
                self._wait_at_most(base, wait_s)
                yield base
        except ImportError as error:
            raise DatabaseError(
                f"GEOPRELABEL_DATABASE_URL needs a driver that is missing ({error}); pip install 'psycopg[binary]'"
            ) from error
        except (SQLAlchemyError, OSError) as error:
            # The next call opens it anew: the file may have been deleted meanwhile.
            self.close()
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            if self._url:
                self._failure = f"the database of GEOPRELABEL_DATABASE_URL cannot be used: {reason}"
            else:
                is_bad = "malformed" in reason or "not a d" in reason
                hint = "; delete it: Label Studio has what it held" if is_bad else ""
                self._failure = f"{self._path} cannot be used: {reason}{hint}"
            self._paused_until = time.monotonic() + PAUSE_S
            raise DatabaseError(self._failure) from error

    def _make(self, tables: Sequence[str], wait_s: float) -> None:
        with self.engine.begin() as base:
            self._wait_at_most(base, wait_s)
            if base.dialect.name == "postgresql":
                # Two that make the same table at once get in each other's way, IF NOT EXISTS or not.
                execute(base, "SELECT pg_advisory_xact_lock(:number)", {"number": _SETUP_LOCK})
            for statement in tables:
                execute(base, statement)
        self._made.add(tables)

    @contextmanager
    def in_turn(self, name: str) -> Iterator[None]:
        """Alone among all processes that have this database; one that dies gives its turn up. Raises DatabaseError."""
        if self.is_sqlite:
            path = Path(self.engine.url.database or self._path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.{name}.lock"):
                yield
            return
        # A lock of the session: it goes with the connection. A name's number is the same in every process.
        values = {"number": int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])}
        with self.transaction() as base:
            execute(base, "SET LOCAL lock_timeout = 0")
            execute(base, "SELECT pg_advisory_xact_lock(:number)", values)
            yield

    def close(self) -> None:
        """Let go of all connections; the next use makes new ones."""
        self._made.clear()
        engine = self.__dict__.pop("engine", None)
        if engine is not None:
            engine.dispose()

    @functools.cached_property
    def engine(self) -> Engine:
        """SQLAlchemy's, for this process."""
        with IMPORTING:
            import sqlalchemy

        url = sqlalchemy.make_url(self._url or f"sqlite:///{self._path.absolute()}")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() != "sqlite":
            return sqlalchemy.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 2})
        if not self._url:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        engine = sqlalchemy.create_engine(url)
        sqlalchemy.event.listen(engine, "connect", _prepare_sqlite)
        return engine

    @staticmethod
    def _wait_at_most(base: Connection, wait_s: float) -> None:
        setting = "PRAGMA busy_timeout" if base.dialect.name == "sqlite" else "SET LOCAL lock_timeout"
        execute(base, f"{setting} = {wait_s * 1000:.0f}")


class PlainConnection:
    """So much of a `sqlite3.Connection` as simple tables need."""

    def __init__(self, base: Connection) -> None:
        self._base = base

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """The rows, or nothing."""
        if self._base.dialect.name != "sqlite":
            statement = statement.replace("?", "%s")
        return self._base.exec_driver_sql(statement, tuple(values))


@functools.cache
def load_library() -> type[Exception]:
    """Import the database's library, once: MLflow's import holds the lock for seconds. Gives its root of errors."""
    with IMPORTING:
        import sqlalchemy.exc

    return sqlalchemy.exc.SQLAlchemyError


def execute(base: Connection, statement: str, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ()) -> Any:
    """Carry out a statement with ``:name`` in the place of values, once for each row."""
    from sqlalchemy import text

    return base.execute(text(statement), rows or None)


def now_s(base: Connection) -> float:
    """The database's own time, seconds since 1970: the same for all servers, however their clocks are set."""
    is_sqlite = base.dialect.name == "sqlite"
    clock = "(julianday('now') - 2440587.5) * 86400.0" if is_sqlite else "extract(epoch FROM clock_timestamp())"
    return float(execute(base, f"SELECT {clock}").scalar_one())


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.execute(f"PRAGMA busy_timeout = {WAIT_S * 1000:.0f}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA secure_delete = ON")
