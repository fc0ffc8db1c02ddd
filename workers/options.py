"""What a worker's options name: versions of adapters, and the queues of its own partitions."""

from collections.abc import Sequence

from core.errors import UsageError
from core.partitions import queue_name
from db import registry
from db.database import Database
from workers.launcher import WorkerSpec


async def pinned(database: Database, base_model_id: int, spec: WorkerSpec, slots: int) -> list[int]:
    """The versions that `--pin` names: those that are current now, of every tenant."""
    most = max(0, slots - 1)
    if len(spec.pin) > most:
        raise UsageError(
            f"--pin {','.join(spec.pin[most:])}: with {slots} slots (--max-loras) at most {most} "
            "adapters may be pinned, so that the others have one"
        )
    versions = await named(database, base_model_id, "--pin", spec.pin)
    if len(versions) > most:
        raise UsageError(
            f"--pin {','.join(spec.pin)}: these are {len(versions)} adapters of several tenants; "
            f"at most {most} may be pinned with {slots} slots (--max-loras)"
        )
    return versions


async def named(
    database: Database, base_model_id: int, option: str, names: Sequence[str]
) -> list[int]:
    """The versions that are current now of adapters of these names, of every tenant."""
    versions: list[int] = []
    for name in names:
        found = await registry.current_versions(database, base_model_id, name)
        if not found:
            raise UsageError(
                f"{option} {name}: no adapter of this base model has that name and is ready"
            )
        versions += found
    return versions


def queues(spec: WorkerSpec, base_model: str, partitions: int) -> list[str]:
    """The queues of the partitions that this worker serves wholly.

    Of one that it serves in part it would swallow doorbells that were meant for others: a worker
    of a few adapters consumes none, and polls. Dedicated partitions are heard by those that name
    them.
    """
    if spec.adapters is not None:
        return []
    served = range(partitions) if spec.partitions is None else spec.partitions
    return [queue_name(base_model, partition) for partition in served]
