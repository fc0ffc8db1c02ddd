"""An index by which a job with a near deadline overtakes inside its line. Reversible.

Built CONCURRENTLY, outside a transaction: `jobs` may have millions of rows.
"""

from collections.abc import Sequence

from alembic import op

from migrations.concurrently import create_index

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

NAME = "ix_jobs_pressing"


def upgrade() -> None:
    create_index(
        NAME,
        "jobs",
        "base_model_id, adapter_version_id, tenant_id, deadline",
        "state = 'queued' AND deadline IS NOT NULL",
    )


def downgrade() -> None:
    op.drop_index(NAME, table_name="jobs")
