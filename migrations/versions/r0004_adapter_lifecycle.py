"""The life of an adapter's versions: admission, probes, retirement; what is known of bases.

Expands only; reversible.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("base_models", sa.Column("modules", sa.JSON(), nullable=True))
    op.add_column("base_models", sa.Column("vocab_size", sa.Integer(), nullable=True))
    op.add_column("base_models", sa.Column("tokenizer_size", sa.Integer(), nullable=True))
    op.add_column("workers", sa.Column("resident", sa.ARRAY(sa.Integer()), nullable=True))
    op.add_column("adapters", sa.Column("retired_at", _TIME, nullable=True))
    op.add_column("adapters", sa.Column("held_below", sa.Integer(), nullable=True))
    versions = "adapter_versions"
    op.add_column(versions, sa.Column("findings", sa.JSON(), nullable=True))
    op.add_column(versions, sa.Column("probe", sa.JSON(), nullable=True))
    op.add_column(versions, sa.Column("probe_worker", sa.BigInteger(), nullable=True))
    for name, kind in (
        ("probe_attempt", sa.Integer()),
        ("probe_deaths", sa.SmallInteger()),
        ("probe_losses", sa.SmallInteger()),
    ):
        op.add_column(versions, sa.Column(name, kind, server_default="0", nullable=False))
    for name in ("validated_at", "retired_at", "deleted_at"):
        op.add_column(versions, sa.Column(name, _TIME, nullable=True))
    op.create_check_constraint(
        op.f("ck_adapter_versions_reasons"),
        versions,
        "state <> 'rejected' OR findings IS NOT NULL",
    )
    op.create_index(
        "ix_adapter_versions_validating",
        versions,
        ["adapter_id"],
        postgresql_where=sa.text("state = 'validating'"),
    )
    op.create_index("ix_adapter_versions_sha256", versions, ["sha256"])


def downgrade() -> None:
    versions = "adapter_versions"
    op.drop_index("ix_adapter_versions_sha256", versions)
    op.drop_index("ix_adapter_versions_validating", versions)
    op.drop_constraint(op.f("ck_adapter_versions_reasons"), versions)
    for name in ("deleted_at", "retired_at", "validated_at"):
        op.drop_column(versions, name)
    for name in ("probe_losses", "probe_deaths", "probe_attempt", "probe_worker", "probe"):
        op.drop_column(versions, name)
    op.drop_column(versions, "findings")
    op.drop_column("adapters", "held_below")
    op.drop_column("adapters", "retired_at")
    op.drop_column("workers", "resident")
    for name in ("tokenizer_size", "vocab_size", "modules"):
        op.drop_column("base_models", name)
