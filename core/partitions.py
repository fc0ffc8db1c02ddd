"""Partitions: the fixed buckets whose Celery queues carry the doorbells.

Their number is fixed because Redis serves thousands of queues slowly (a BRPOP names them all).
"""

import hashlib
from typing import Final

#: The bucket of the base model's own jobs.
BASE_PARTITION: Final = 0
#: The highest number of a partition. From `LORRY_PARTITIONS` on they are dedicated ones, which an
#: operator gives to adapters by hand; their doorbells are heard by the workers that name them.
LAST_PARTITION: Final = 9999


def partition_of(adapter: str, partitions: int) -> int:
    """The bucket of an adapter, in 0 … `partitions` − 1.

    `adapter` is the adapter's id as text. The hash is stable across processes and releases
    (Python's own is salted per process).
    """
    digest = hashlib.blake2b(adapter.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % partitions


def queue_name(base_model: str, partition: int) -> str:
    """The Celery queue that carries the doorbells of one partition of one base model."""
    return f"lorry.{base_model}.{partition}"
