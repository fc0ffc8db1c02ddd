"""Adapter files on this worker's disk: fetched from the store, verified, ready to load."""

import asyncio
from pathlib import Path

from core.errors import AdapterInvalid
from db.claims import version_files
from db.database import Database
from db.store import Store
from workers.engine.protocol import LocalAdapter


class AdapterFiles:
    """Turns an adapter version's id into a verified local folder, once per version."""

    def __init__(self, database: Database, store: Store, cache: Path) -> None:
        self._database = database
        self._store = store
        self._cache = cache
        self._local: dict[int, LocalAdapter] = {}

    async def local(self, adapter_version_id: int) -> LocalAdapter:
        """The local copy of a version, fetched if need be (in a thread: it reads every byte).

        Raises:
            AdapterInvalid: the version or its files are not there, or not as they were stored.
            Unavailable: Postgres cannot be reached.
        """
        if known := self._local.get(adapter_version_id):
            return known
        files = await version_files(self._database, adapter_version_id)
        if files is None:
            raise AdapterInvalid(f"adapter version {adapter_version_id} is not registered")
        try:
            path = await asyncio.to_thread(self._store.fetch, files.sha256, self._cache)
        except OSError as error:
            raise AdapterInvalid(f"adapter {files.sha256} cannot be fetched: {error}") from error
        adapter = LocalAdapter(
            lora_int_id=adapter_version_id,
            lora_name=f"{adapter_version_id}-{files.sha256}",
            path=str(path),
            sha256=files.sha256,
        )
        self._local[adapter_version_id] = adapter
        return adapter
