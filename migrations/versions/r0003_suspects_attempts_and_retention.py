"""Suspects, the history of attempts, and an index to prune by. Expands only; reversible.

The indexes are built CONCURRENTLY, each outside a transaction: `jobs` may have millions of rows,
and nobody's work waits for them.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from migrations.concurrently import create_index

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

#: name, columns, condition
INDEXES = (
    (
        "ix_jobs_suspects",
        "base_model_id, suspect_group",
        "suspect_group IS NOT NULL AND state = 'queued'",
    ),
    ("ix_jobs_finished", "finished_at", "finished_at IS NOT NULL"),
)


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("suspect_groups"), if_not_exists=True))
    # nullable and without a default: no row is rewritten
    op.execute("ALTER TABLE jobs ADD COLUMN IF NOT EXISTS suspect_group BIGINT")
    op.execute("ALTER TABLE jobs ADD COLUMN IF NOT EXISTS suspect_deaths SMALLINT")
    op.execute("ALTER TABLE job_outputs ADD COLUMN IF NOT EXISTS worker_id BIGINT")
    op.create_table(
        "job_attempts",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.UUID(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "ended_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('released', 'retried', 'rescued', 'suspect')",
            name=op.f("ck_job_attempts_outcome"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "job_id", "attempt", name=op.f("pk_job_attempts")),
        if_not_exists=True,
    )
    for name, columns, condition in INDEXES:
        create_index(name, "jobs", columns, condition)


def downgrade() -> None:
    for name, _, _ in INDEXES:
        op.drop_index(name, table_name="jobs")
    op.drop_table("job_attempts")
    op.drop_column("job_outputs", "worker_id")
    op.drop_column("jobs", "suspect_deaths")
    op.drop_column("jobs", "suspect_group")
    op.execute(sa.schema.DropSequence(sa.Sequence("suspect_groups")))
