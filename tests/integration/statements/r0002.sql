-- What the release of revision 0002 sends, as it sends it: tests/integration/test_old_release.py runs
-- these against the newest schema. Never edit; the next release gets a file of its own.

-- name: submit
WITH  job AS (
    INSERT INTO jobs (id, tenant_id, base_model_id, adapter_version_id, priority, place, tokens,
                      deadline)
    SELECT $1, $2, $3, $4, $5, $6, $7, $8 WHERE true
    RETURNING 1
), input AS (
    INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body, metadata)
    SELECT $1, $2, $9, $10, $11::text::json, $12::text::json WHERE true
), held AS (
    SELECT FROM waiting_adapters
    WHERE base_model_id = $3 AND adapter_version_id = $4 AND tenant_id = $2
    FOR KEY SHARE
), waiting AS (
    INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition)
    SELECT $3, $4, $2, 
    coalesce(
        (SELECT a.partition FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
         WHERE v.id = $4),
        0
    )

    WHERE NOT EXISTS (SELECT FROM held) AND true
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT EXISTS (SELECT FROM job) AS submitted,
       EXISTS (SELECT FROM held) OR EXISTS (SELECT FROM waiting) AS waiting

-- name: submit_once
WITH used AS (
    INSERT INTO idempotency_keys (tenant_id, route, key, fingerprint, resource_id)
    VALUES ($2, $13, $14, $15, $1)
    ON CONFLICT DO NOTHING
    RETURNING 1
), job AS (
    INSERT INTO jobs (id, tenant_id, base_model_id, adapter_version_id, priority, place, tokens,
                      deadline)
    SELECT $1, $2, $3, $4, $5, $6, $7, $8 WHERE EXISTS (SELECT FROM used)
    RETURNING 1
), input AS (
    INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body, metadata)
    SELECT $1, $2, $9, $10, $11::text::json, $12::text::json WHERE EXISTS (SELECT FROM used)
), held AS (
    SELECT FROM waiting_adapters
    WHERE base_model_id = $3 AND adapter_version_id = $4 AND tenant_id = $2
    FOR KEY SHARE
), waiting AS (
    INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition)
    SELECT $3, $4, $2, 
    coalesce(
        (SELECT a.partition FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
         WHERE v.id = $4),
        0
    )

    WHERE NOT EXISTS (SELECT FROM held) AND EXISTS (SELECT FROM used)
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT EXISTS (SELECT FROM job) AS submitted,
       EXISTS (SELECT FROM held) OR EXISTS (SELECT FROM waiting) AS waiting

-- name: cancel
WITH finished AS (
    UPDATE jobs SET state = 'cancelled', finished_at = now()
    WHERE id = $2 AND tenant_id = $1 AND state IN ('queued', 'running')
    RETURNING id, tenant_id, state
)
SELECT count(*) FROM finished

-- name: register
INSERT INTO workers (base_model_id, hostname, pid, engine, engine_version, limits,
                     lease_expires_at)
VALUES ($1, $2, $3, $4, $5, $6::text::json, now() + make_interval(secs => $7))
RETURNING id

-- name: renew
UPDATE workers
SET heartbeat_at = now(), lease_expires_at = now() + make_interval(secs => $2)
WHERE id = $1 AND lost_at IS NULL
RETURNING true

-- name: look
WITH candidate AS (
    (SELECT adapter_version_id, tenant_id, partition, since FROM waiting_adapters
     WHERE base_model_id = $1 AND ($2::int[] IS NULL OR partition = ANY($2))
       AND ($6::text[] IS NULL OR adapter_version_id IN (
           SELECT v.id FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
           WHERE a.name = ANY($6)
           UNION ALL SELECT 0 FROM base_models WHERE id = $1 AND name = ANY($6)))
     ORDER BY since LIMIT $4)
    UNION
    (SELECT adapter_version_id, tenant_id, partition, since FROM waiting_adapters
     WHERE base_model_id = $1 AND adapter_version_id = ANY($3::int[])
       AND ($2::int[] IS NULL OR partition = ANY($2))
       AND ($6::text[] IS NULL OR adapter_version_id IN (
           SELECT v.id FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
           WHERE a.name = ANY($6)
           UNION ALL SELECT 0 FROM base_models WHERE id = $1 AND name = ANY($6)))
     LIMIT $4)
)
SELECT c.adapter_version_id, c.tenant_id, c.partition,
       extract(epoch FROM clock_timestamp() - c.since)::float8 AS since_seconds,
       head.place, head.jobs,
       extract(epoch FROM head.deadline - clock_timestamp())::float8 AS deadline_seconds
FROM candidate c CROSS JOIN LATERAL (
    SELECT min(due.place) AS place, count(*)::int AS jobs, min(due.deadline) AS deadline
    FROM (
        SELECT place, deadline FROM jobs
        WHERE base_model_id = $1 AND adapter_version_id = c.adapter_version_id
          AND tenant_id = c.tenant_id AND state = 'queued'
          AND (not_before IS NULL OR not_before <= now())
        ORDER BY place LIMIT $5
    ) due
) head
ORDER BY c.since

-- name: claim
WITH due AS MATERIALIZED (
    SELECT ctid AS row FROM jobs
    WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3 AND state = 'queued'
      AND (not_before IS NULL OR not_before <= now())
      AND (deadline IS NULL OR deadline > now())
    ORDER BY place LIMIT $4
    FOR NO KEY UPDATE SKIP LOCKED
), leased AS MATERIALIZED (
    SELECT id FROM workers
    WHERE id = $5 AND lost_at IS NULL AND stopped_at IS NULL AND lease_expires_at > now()
    FOR KEY SHARE
), claimed AS (
    UPDATE jobs SET state = 'running', attempt = attempt + 1, lease_owner = $5,
                    started_at = now(), not_before = NULL
    WHERE ctid = ANY (ARRAY(SELECT row FROM due)) AND EXISTS (SELECT FROM leased)
    RETURNING jobs.id, attempt, tenant_id, adapter_version_id, tokens, failures
)
SELECT c.*, i.endpoint, i.model, i.body::text AS body
FROM claimed c JOIN job_inputs i ON i.tenant_id = c.tenant_id AND i.job_id = c.id

-- name: record
WITH result AS MATERIALIZED (
    SELECT * FROM unnest($2::uuid[], $3::int[], $4::text[], $5::text[], $6::text[],
                         $7::int[], $8::int[])
        AS r(id, attempt, response, error_code, error_message, prompt_tokens, completion_tokens)
), fenced AS MATERIALIZED (
    SELECT id, attempt FROM jobs
    WHERE id = ANY($2::uuid[]) AND lease_owner IS NOT DISTINCT FROM $1 AND state = 'running'
    ORDER BY id
    FOR NO KEY UPDATE
), finished AS (
    UPDATE jobs SET
        state = CASE WHEN r.error_code IS NULL THEN 'succeeded' ELSE 'failed' END,
        failures = failures + CASE WHEN r.error_code IS NULL THEN 0 ELSE 1 END,
        finished_at = now(),
        lease_owner = NULL
    FROM result r
    WHERE jobs.id = ANY(ARRAY(SELECT id FROM fenced)) AND jobs.id = r.id
      AND jobs.attempt = r.attempt
    RETURNING jobs.id, jobs.tenant_id, jobs.state, r.response, r.error_code, r.error_message,
              r.prompt_tokens, r.completion_tokens
), answered AS (
    INSERT INTO job_outputs (tenant_id, job_id, response, error_code, error_message,
                             prompt_tokens, completion_tokens)
    SELECT tenant_id, id, response::json, error_code, error_message,
           prompt_tokens, completion_tokens
    FROM finished
)
SELECT id FROM finished

-- name: retry_later
UPDATE jobs SET state = 'queued', lease_owner = NULL, failures = failures + 1,
                not_before = now() + make_interval(secs => r.delay)
FROM unnest($2::uuid[], $3::int[], $4::float8[]) AS r(id, attempt, delay)
WHERE jobs.id = r.id AND jobs.attempt = r.attempt AND lease_owner = $1
  AND state = 'running'
RETURNING jobs.id, base_model_id, adapter_version_id, tenant_id

-- name: release
UPDATE jobs SET state = 'queued', lease_owner = NULL, releases = releases + 1
FROM unnest($2::uuid[], $3::int[]) AS r(id, attempt)
WHERE jobs.id = r.id AND jobs.attempt = r.attempt AND lease_owner = $1
  AND state = 'running'
RETURNING base_model_id, adapter_version_id, tenant_id

-- name: take_ended
UPDATE jobs SET lease_owner = NULL
WHERE lease_owner = $1 AND state IN ('cancelled', 'expired')
RETURNING id, attempt

-- name: expire
WITH finished AS (
    UPDATE jobs SET state = 'expired', finished_at = now()
    WHERE id IN (
        SELECT id FROM jobs
        WHERE deadline <= now() AND deadline IS NOT NULL AND finished_at IS NULL
        ORDER BY deadline LIMIT $1
        FOR NO KEY UPDATE SKIP LOCKED)
      AND state IN ('queued', 'running')
    RETURNING id, tenant_id, state
)
SELECT count(*) FROM finished

-- name: sign_off
UPDATE workers SET stopped_at = now(), lease_expires_at = now() WHERE id = $1

-- name: sign_off_release
UPDATE jobs SET state = 'queued', lease_owner = NULL, releases = releases + 1
WHERE lease_owner = $1 AND state = 'running'
RETURNING base_model_id, adapter_version_id, tenant_id

-- name: lose
UPDATE workers SET lost_at = now() WHERE id = (
    SELECT id FROM workers
    WHERE lost_at IS NULL AND stopped_at IS NULL AND lease_expires_at < now()
      AND pg_postmaster_start_time() < now() - make_interval(secs => $1)
    ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING id

-- name: free
WITH freed AS (
    UPDATE jobs SET
        failures = failures + 1,
        lease_owner = NULL,
        state = CASE WHEN failures + 1 < $2 THEN 'queued' ELSE 'failed' END,
        finished_at = CASE WHEN failures + 1 < $2 THEN NULL ELSE now() END
    WHERE lease_owner = $1 AND state = 'running'
    RETURNING id, state, base_model_id, adapter_version_id, tenant_id
), finished AS (
    SELECT id, tenant_id, state FROM freed WHERE state = 'failed'
), answered AS (
    INSERT INTO job_outputs (tenant_id, job_id, error_code, error_message)
    SELECT tenant_id, id, 'attempts_exhausted',
           format('its worker was lost %s times while it ran', $2::int)
    FROM finished
)
SELECT state, base_model_id, adapter_version_id, tenant_id FROM freed

-- name: hold_line
WITH held AS (
    SELECT FROM waiting_adapters
    WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
    FOR KEY SHARE
), inserted AS (
    INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition)
    SELECT $1, $2, $3, 
    coalesce(
        (SELECT a.partition FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
         WHERE v.id = $2),
        0
    )

    WHERE NOT EXISTS (SELECT FROM held)
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT EXISTS (SELECT FROM held) OR EXISTS (SELECT FROM inserted)

-- name: lock_line
SELECT true FROM waiting_adapters
WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
FOR UPDATE SKIP LOCKED

-- name: drop_line
DELETE FROM waiting_adapters
WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
  AND NOT EXISTS (
      SELECT FROM jobs
      WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
        AND state = 'queued')
RETURNING true
