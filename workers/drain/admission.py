"""Admission: a worker probes the adapters of its base that are `validating`, one at a time.

The probe takes part in the drain as one more line, the most urgent of all, so that the planner
finds it a free slot and lets no adapter in use be evicted. The feeder loads it, since one task
loads; what follows runs beside the feeding.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from core.adapter_rules import BaseFacts, Finding, check, parse_config
from core.errors import AdapterInvalid, AdapterRejected, StoreUnavailable, Unavailable
from db import admission
from db.admission import MOST_LOSSES, ProbeClaim
from db.claims import WaitingLine
from db.database import Database
from db.doorbell import Doorbell
from db.safetensors_file import BadSafetensors, read_header
from db.waiting import Line
from workers.adapter_files import LONG_PATIENCE_SECONDS, AdapterFiles
from workers.drain.slots import Slots
from workers.engine.protocol import AdapterLoadError, Engine, LocalAdapter, ProbeResult

log = logging.getLogger(__name__)

#: How long a death of the engine may take to be heard of here, once its jobs have come back.
DEATH_TOLD_SECONDS: Final = 0.01


class Admission:
    """Claims, probes and records. All its methods run on the event loop that owns the engine.

    Args:
        wake: makes the feeder look at once.
        every_seconds: pause between looks for adapters to probe.
    """

    def __init__(
        self,
        *,
        database: Database,
        engine: Engine,
        files: AdapterFiles,
        slots: Slots,
        doorbell: Doorbell,
        worker_id: int,
        base_model_id: int,
        every_seconds: float,
        wake: Callable[[], None],
    ) -> None:
        self._database = database
        self._engine = engine
        self._files = files
        self._slots = slots
        self._doorbell = doorbell
        self._worker_id = worker_id
        self._base_model_id = base_model_id
        self._every_seconds = every_seconds
        self._wake = wake
        self._claim: ProbeClaim | None = None
        self._loaded: asyncio.Future[float] | None = None
        #: whether a living engine has had to do with the claimed adapter
        self._began = False
        self._dead: asyncio.Task[str] | None = None
        #: whether a probe is in the engine
        self.probing = False

    # -- its part in the drain ------------------------------------------------------------

    def lines(self) -> list[WaitingLine]:
        """What the planner sees: a line of one, most urgent, while a probe wants a slot."""
        claim = self._claim
        if claim is None or self._loaded is None or self._loaded.done():
            return []
        line = Line(self._base_model_id, claim.version_id, claim.tenant_id)
        return [WaitingLine(line, claim.partition, 0.0, 0, 1, deadline_seconds=-1e9)]

    def wants(self, line: Line) -> bool:
        """Whether this line is the probe's own."""
        return any(waiting.line == line for waiting in self.lines())

    async def load(self) -> None:
        """Load the adapter into the slot that the planner found. Called by the feeder.

        Raises:
            EngineDead: the engine died of it.
        """
        claim, loaded = self._claim, self._loaded
        assert claim is not None and loaded is not None and self._dead is not None
        # the slot may be free because the engine has died just now: that is told a little later
        await asyncio.wait({self._dead}, timeout=DEATH_TOLD_SECONDS)
        self._began = not self._dead.done()
        started = time.monotonic()
        try:
            await self._slots.load(claim.version_id)
        except (AdapterInvalid, AdapterLoadError, StoreUnavailable) as error:
            if not loaded.done():  # else this worker stops
                loaded.set_exception(error)
        else:
            self._slots.enter(claim.version_id, 1)  # stays until the probe has ended
            self.probing = not loaded.done()
            if not loaded.done():
                loaded.set_result(time.monotonic() - started)

    # -- the loop -------------------------------------------------------------------------

    async def run(self) -> None:
        """Probe for ever. Raises EngineDead."""
        if not self._engine.info.limits.max_loras:
            return  # adapters are off: other workers' matter
        self._dead = asyncio.create_task(self._engine.wait_dead())
        try:
            await self._run()
        finally:
            self._dead.cancel()

    async def _run(self) -> None:
        while True:
            try:
                self._claim = await admission.claim_probe(
                    self._database, self._worker_id, self._base_model_id
                )
                if self._claim is not None:
                    await self._admit(self._claim)
                    continue
            except (StoreUnavailable, Unavailable) as error:
                # a claim whose record was lost is found again: by this worker's own end
                log.warning("No probe: %s", error, extra={"action": "probe_waits"})
                await self._record_later()
            await asyncio.sleep(self._every_seconds)

    async def engine_died(self, reason: str) -> None:
        """The engine has died: it may have been the adapter's doing. Raises Unavailable."""
        if (claim := self._claim) is not None and self._began:
            rejected = await admission.engine_died(self._database, self._worker_id, claim, reason)
            log.error("Engine died during the probe of %s", claim.model, extra=_extra(claim))
            self._began = False  # told once, however often the sign-off is tried
            if rejected:
                await admission.fail_rejected(self._database)

    async def _admit(self, claim: ProbeClaim) -> None:
        self._began = False
        findings, probe = await self._judge(claim)
        if findings:
            recorded = await admission.reject(
                self._database, self._worker_id, claim, findings, probe
            )
        else:
            recorded = await admission.admit(self._database, self._worker_id, claim, probe)
        self._claim = None
        if not recorded:
            return
        if findings:
            log.warning("Rejected %s: %s", claim.model, findings[0].message, extra=_extra(claim))
            while await admission.fail_rejected(self._database):
                pass
        else:
            log.info("Admitted %s", claim.model, extra=_extra(claim) | probe)
        # its jobs may be queued already, and other workers' too
        self._doorbell.ring(self._engine.info.base_model, claim.partition)
        self._wake()

    async def _judge(self, claim: ProbeClaim) -> tuple[list[Finding], dict[str, Any]]:
        """What is wrong with a version, and what its probe measured."""
        probe: dict[str, Any] = {
            "engine": self._engine.info.name,
            "engine_version": self._engine.info.version,
            "worker": self._worker_id,
        }
        if claim.losses >= MOST_LOSSES:
            return [admission.lost_workers(claim.losses)], probe
        try:
            adapter = await self._files.local(claim.version_id, LONG_PATIENCE_SECONDS)
            # the rules once more: it may have come before anything was known of the base
            if findings := await asyncio.to_thread(_check_files, adapter, claim.base):
                return findings, probe
            seconds, result = await self._probe(claim, adapter)
        except AdapterInvalid as error:
            return [Finding("files_missing", f"{error.message}: add it again")], probe
        except AdapterLoadError as error:
            return [_load_failed(error)], probe
        probe |= {
            "load_seconds": round(seconds, 4),
            "memory_bytes": result.memory_bytes,
            "differs": result.differs,
            "difference": result.difference,
        }
        if result.note:
            probe["note"] = result.note
        return ([_no_effect()] if result.differs is False else []), probe

    async def _probe(self, claim: ProbeClaim, adapter: LocalAdapter) -> tuple[float, ProbeResult]:
        """Wait for a slot, load, probe; returns the load's seconds too."""
        self._loaded = asyncio.get_running_loop().create_future()
        self._wake()
        try:
            seconds = await self._loaded
            try:
                return seconds, await self._engine.probe_adapter(adapter)
            finally:
                self.probing = False
                self._slots.leave(claim.version_id)
        finally:
            self._loaded = None
            self._wake()

    async def _record_later(self) -> None:
        """Give up a claim that could not be recorded, so that it is probed again."""
        if (claim := self._claim) is None:
            return
        while True:
            try:
                await admission.give_back(self._database, self._worker_id, claim)
            except Unavailable:
                await asyncio.sleep(1)
            else:
                self._claim = None
                return


def _check_files(adapter: LocalAdapter, base: BaseFacts) -> list[Finding]:
    """The rules that need no engine, over the files as the engine will read them. Blocking."""
    folder = Path(adapter.path)
    try:
        config = parse_config((folder / "adapter_config.json").read_bytes())
        places = read_header(folder / "adapter_model.safetensors")
    except AdapterRejected as error:
        return list(error.findings)
    except (OSError, BadSafetensors) as error:
        return [Finding("safetensors_invalid", f"{error}: save the adapter again")]
    return check(config, {name: place.info for name, place in places.items()}, base)


def _load_failed(error: AdapterLoadError) -> Finding:
    return Finding(
        "load_failed", f"the engine cannot load it ({error}): save it again for this base model"
    )


def _no_effect() -> Finding:
    return Finding(
        "no_effect",
        "it loads and changes nothing: the next token's probabilities on a fixed prompt are the "
        "base model's own. Its tensors' names may mean other modules than the base has, or it was "
        "saved before training; `lorry adapters check` says which modules there are",
    )


def _extra(claim: ProbeClaim) -> dict[str, Any]:
    return {"action": "probe", "adapter_version": claim.version_id, "attempt": claim.attempt}
