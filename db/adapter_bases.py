"""Which base model an adapter is for."""

from dataclasses import dataclass

from core.adapter_rules import AdapterConfig
from core.errors import InvalidRequest
from db.database import Connection


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base model by its id and its name outside."""

    id: int
    name: str


async def base_of(
    connection: Connection,
    tenant_id: int,
    name: str | None,
    base_model: str | None,
    config: AdapterConfig,
) -> KnownBase:
    """The base model that an adapter is for: the one named, its name's, the only one, or the one
    that its configuration means.
    """
    rows = await connection.fetch("SELECT id, name FROM base_models ORDER BY name LIMIT 1000")
    bases = [KnownBase(row["id"], row["name"]) for row in rows]
    former: str | None = name and await connection.fetchval(
        "SELECT b.name FROM adapters a JOIN base_models b ON b.id = a.base_model_id"
        " WHERE a.tenant_id = $1 AND a.name = $2",
        tenant_id,
        name,
    )
    if former and base_model not in (None, former):
        raise other_base(str(name), former)
    base_model = base_model or former
    if base_model is not None:
        fitting = [base for base in bases if base.name == base_model]
    elif len(bases) == 1:
        fitting = bases
    else:
        fitting = [base for base in bases if _last_part(base.name) == _last_part(config.base_model)]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(base.name for base in bases[:10]) or "none; start a worker first"
    if base_model is not None:
        raise InvalidRequest(
            f"base_model {base_model[:200]!r} is not known; there are: {known}", field="base_model"
        )
    raise InvalidRequest(
        f"base_model is needed, since adapter_config.json says {config.base_model!r} and there "
        f"are: {known}",
        field="base_model",
    )


def _last_part(name: str | None) -> str:
    return (name or "").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].casefold()


def other_base(name: str, base_model: str) -> InvalidRequest:
    """The error for an adapter of a name that belongs to another base."""
    return InvalidRequest(
        f"adapter {name!r} belongs to {base_model!r}: an adapter has one base; add these weights "
        "under another name",
        field="base_model",
    )
