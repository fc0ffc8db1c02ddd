"""What finishing a job brings with it, in the statement that finishes it.

Every statement that makes jobs final names them in a CTE `finished` with the columns of
`FINISHED`, and puts `CONSEQUENCES` behind it: batches' counts, what was used, and webhooks owed are
written there or nowhere, so that no way of finishing forgets them and none writes them twice.
"""

from typing import Final

from db.deliveries import ENDPOINT_LINE, URL_LINE

#: What `finished` has of the job's row. Beside these: prompt_tokens, completion_tokens and
#: cached_tokens, which are `NO_TOKENS` where there is no answer.
FINISHED: Final = """jobs.id, jobs.tenant_id, jobs.state, jobs.base_model_id,
              jobs.adapter_version_id, jobs.batch_id, jobs.batch_line, jobs.webhook"""
NO_TOKENS: Final = "0 AS prompt_tokens, 0 AS completion_tokens, 0 AS cached_tokens"

#: Counts the jobs of batches. A batch's row is locked from here to the commit, in the order of ids,
#: so that no two statements wait for each other in a circle. The lock also orders the steps: who
#: can see one of them can see all before it, which is what makes the position a cursor.
COUNTED: Final = """, batched AS MATERIALIZED (
    SELECT batch_id, array_agg(batch_line ORDER BY batch_line) AS lines, count(*)::int AS finished,
           (count(*) FILTER (WHERE state = 'succeeded'))::int AS completed,
           (count(*) FILTER (WHERE state = 'expired'))::int AS expired,
           sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens,
           sum(cached_tokens) AS cached_tokens
    FROM finished WHERE batch_id IS NOT NULL GROUP BY batch_id
), locked AS MATERIALIZED (
    SELECT id FROM batches WHERE id = ANY(ARRAY(SELECT batch_id FROM batched))
    ORDER BY id FOR NO KEY UPDATE
), counted AS (
    UPDATE batches b SET
        completed = b.completed + d.completed,
        failed = b.failed + d.finished - d.completed,
        expired = b.expired + d.expired,
        input_tokens = b.input_tokens + d.prompt_tokens,
        output_tokens = b.output_tokens + d.completion_tokens,
        cached_tokens = b.cached_tokens + d.cached_tokens,
        ended_at = CASE WHEN b.completed + b.failed + d.finished = b.total THEN now() END,
        -- one whose window ended, or that was cancelled, goes straight to that end; lines may
        -- also have expired at deadlines of their own. The clock, not the transaction's beginning:
        -- a statement that waited for the lock comes after the one that it waited for
        status = CASE WHEN b.completed + b.failed + d.finished = b.total
                           AND b.status = 'in_progress'
                           AND (b.expired + d.expired = 0 OR clock_timestamp() < b.expires_at)
                      THEN 'finalizing' ELSE b.status END,
        finalizing_at = CASE WHEN b.completed + b.failed + d.finished = b.total
                             THEN now() END
    FROM batched d
    WHERE b.id = d.batch_id AND b.id = ANY(ARRAY(SELECT id FROM locked))
    RETURNING b.id, b.completed + b.failed - d.finished AS position, d.lines
), stepped AS (
    INSERT INTO batch_steps (batch_id, position, lines) SELECT id, position, lines FROM counted
)"""

#: What was used, a row for each adapter and statement: a sum kept per day here would be a row that
#: every worker waits for. The steward adds the rows up (db/usage.py).
USED: Final = """, used AS (
    INSERT INTO usage_entries (day, tenant_id, base_model_id, adapter_version_id, jobs,
                               input_tokens, output_tokens)
    SELECT (now() AT TIME ZONE 'UTC')::date, tenant_id, base_model_id, adapter_version_id,
           count(*), sum(prompt_tokens), sum(completion_tokens)
    FROM finished WHERE state = 'succeeded'
    GROUP BY tenant_id, base_model_id, adapter_version_id
)"""

#: Webhooks owed. A job alone is told to the endpoints that listen to its tenant's jobs, and to the
#: URL that it named itself; a batch's lines are told of by their batch alone. Where nobody listens
#: and no job named a URL, this reads an empty list once.
OWED: Final = f""", listening AS MATERIALIZED (
    SELECT id, tenant_id, events FROM webhook_endpoints
    WHERE disabled_at IS NULL
      AND tenant_id IN (SELECT tenant_id FROM finished WHERE batch_id IS NULL)
), told AS MATERIALIZED (
    SELECT id, tenant_id, state, webhook, uuidv7() AS event_id FROM finished
    WHERE batch_id IS NULL AND (webhook OR EXISTS (SELECT FROM listening))
), owed AS (
    INSERT INTO deliveries (tenant_id, endpoint_id, url, line, event_id, type, subject, told)
    SELECT t.tenant_id, r.endpoint_id, r.url, r.line, t.event_id, 'job.' || t.state,
           'job_' || replace(t.id::text, '-', ''), t.state
    FROM told t CROSS JOIN LATERAL (
        SELECT NULL::uuid AS endpoint_id, i.webhook_url AS url,
               {URL_LINE.format(tenant="t.tenant_id", url="i.webhook_url")} AS line
        FROM job_inputs i
        WHERE t.webhook AND i.tenant_id = t.tenant_id AND i.job_id = t.id
        UNION ALL
        SELECT l.id, NULL, {ENDPOINT_LINE.format(endpoint="l.id")}
        FROM listening l
        WHERE l.tenant_id = t.tenant_id AND 'job.' || t.state = ANY(l.events)
    ) r
)"""

#: CTEs, each beginning with a comma, that read `finished`.
CONSEQUENCES: Final = COUNTED + USED + OWED
