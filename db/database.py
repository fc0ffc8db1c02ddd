"""One connection pool per process, and what its failures mean to a caller."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import asyncpg
import asyncpg.pool

from core.errors import Unavailable

if TYPE_CHECKING:  # asyncpg's classes are generic in its stubs alone
    #: What a connection is, in signatures all over `db/`.
    Connection = (
        asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    )
else:
    Connection = asyncpg.Connection

CONNECT_SECONDS = 5.0
#: Longest wait for one statement: a network that hangs must not hang us.
COMMAND_SECONDS = 30.0
#: Connections of a pool that are kept during other work, such as file I/O under a session's lock.
LONG_USES = 2
#: A client frozen inside a transaction, as by SIGSTOP, keeps its locks no longer than this.
IDLE_TRANSACTION_SECONDS = 15.0

SESSION = {
    "application_name": "lorry",
    "timezone": "UTC",
    "idle_in_transaction_session_timeout": f"{IDLE_TRANSACTION_SECONDS:.0f}s",
    # a queue's working set is in memory: a few hundred rows by key beat a scan of the table
    "random_page_cost": "1.1",
    # a client that vanished with its network must not keep its connection
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}

#: Failures of the connection, the server or its machine, not of the statement: another try may
#: succeed. By classes of SQLSTATE where one is named whole.
OUTAGES = (
    OSError,
    TimeoutError,
    asyncio.TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the driver and the server are out of step
    asyncpg.PostgresConnectionError,  # 08
    asyncpg.TransactionRollbackError,  # 40: a deadlock, of which this was the victim
    asyncpg.InsufficientResourcesError,  # 53: disk full, too many connections
    asyncpg.OperatorInterventionError,  # 57: shut down, starting up, cancelled
    asyncpg.PostgresSystemError,  # 58: I/O
    asyncpg.InternalServerError,  # XX
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InvalidCachedStatementError,  # the schema was migrated under this connection
)


class Database:
    """The pool. Opened and closed by the process that owns it."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool
        #: to be held by who keeps a connection during other work: the rest of the pool stays free
        self.long_uses = asyncio.Semaphore(LONG_USES)

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        min_size: int = 1,
        max_size: int = 8,
        command_seconds: float = COMMAND_SECONDS,
    ) -> Self:
        """Open a pool.

        Args:
            url: `postgresql://…`, as libpq writes it.
            min_size: connections opened at once.
            max_size: the most connections; a caller beyond them waits.
            command_seconds: longest wait for one statement.

        Raises:
            Unavailable: the server cannot be reached.
        """
        try:
            pool = await asyncpg.create_pool(
                url,
                min_size=min_size,
                max_size=max_size,
                timeout=CONNECT_SECONDS,
                command_timeout=command_seconds,
                reset=_keep_session,
                server_settings=SESSION,
            )
        except OUTAGES as error:
            raise unavailable(error) from error
        return cls(pool)

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, *, max_size: int = 8) -> AsyncIterator[Self]:
        """`open`, closed at the end of the block."""
        database = await cls.open(url, max_size=max_size)
        try:
            yield database
        finally:
            await database.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection from the pool, each statement its own transaction.

        Raises:
            Unavailable: Postgres cannot be reached, or was lost on the way. What was under way
                may or may not have been committed.
        """
        try:
            async with self._pool.acquire(timeout=CONNECT_SECONDS) as connection:
                try:
                    yield connection
                except (asyncpg.InterfaceError, asyncpg.InternalClientError):
                    # a server's last words may have come between two statements: what state it is
                    # in nobody knows, and the pool would hand it out again
                    connection.terminate()
                    raise
        except OUTAGES as error:
            raise unavailable(error) from error
        except asyncpg.UndefinedTableError as error:
            raise Unavailable(f"the schema is not there ({error}): run `lorry migrate`") from error

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection inside one transaction, committed at the end of the block."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def fetch_value(self, statement: str, *arguments: Any) -> Any:
        """The first column of the first row."""
        async with self.connection() as connection:
            return await connection.fetchval(statement, *arguments)

    async def close(self) -> None:
        """Close every connection; at once if they do not end within a second."""
        try:
            async with asyncio.timeout(1):
                await self._pool.close()
        except (TimeoutError, *OUTAGES):
            self._pool.terminate()


async def _keep_session(_connection: object) -> None:
    """Nothing here changes a session's state, so asyncpg's reset would be a wasted round trip."""


def unavailable(error: BaseException) -> Unavailable:
    """The error a client sees when Postgres is out of reach."""
    detail = str(error) or type(error).__name__
    if isinstance(error, asyncpg.TransactionRollbackError | asyncpg.LockNotAvailableError):
        return Unavailable(f"Postgres let another transaction go first ({detail}); try again")
    return Unavailable(f"Postgres cannot be reached ({detail}); try again in a few seconds")
