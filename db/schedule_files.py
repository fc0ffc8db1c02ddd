"""The files of a schedule: what its batches are given, kept for as long as it has them."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from db import files
from db.database import Connection
from db.files import Written


@dataclass(frozen=True, slots=True)
class ScheduleInput:
    """What a schedule's batches are given.

    Args:
        file_id: the file that each gets.
        made: where that file was made for the schedule: it is entered with it.
        rows_file_id: the file whose rows filled the template.
        requests: how many requests were given with the schedule; None where a file was.
    """

    file_id: UUID
    endpoint: str
    made: Written | None = None
    rows_file_id: UUID | None = None
    template: dict[str, Any] | None = None
    requests: int | None = None


class InputLost(Exception):
    """The file made for a schedule was taken for abandoned."""


async def keep_files(connection: Connection, tenant_id: int, given: ScheduleInput) -> None:
    """A schedule's files do not expire."""
    if given.made is not None:
        row = await files.finish(connection, given.file_id, given.made)
        if row is None:
            raise InputLost
    await connection.execute(
        "UPDATE files SET expires_at = NULL WHERE tenant_id = $1 AND id = ANY($2::uuid[])",
        tenant_id,
        [each for each in (given.file_id, given.rows_file_id) if each is not None],
    )


async def release_files(connection: Connection, tenant_id: int, schedule_id: UUID) -> None:
    """A schedule's files expire again, 30 days from now, unless another schedule has them.

    That is long enough for batches that have not read theirs yet.
    """
    await connection.execute(
        """
        UPDATE files f SET expires_at = now() + interval '30 days'
        FROM schedules s
        WHERE s.tenant_id = $1 AND s.id = $2 AND f.tenant_id = $1
          AND f.id IN (s.input_file_id, s.rows_file_id) AND f.expires_at IS NULL
          AND NOT EXISTS (SELECT FROM schedules o WHERE o.id <> $2 AND o.input_file_id = f.id)
          AND NOT EXISTS (SELECT FROM schedules o WHERE o.id <> $2 AND o.rows_file_id = f.id)
        """,
        tenant_id,
        schedule_id,
    )
