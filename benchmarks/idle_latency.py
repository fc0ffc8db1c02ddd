"""How long a lone job takes on an idle stack: POST /v1/jobs to its answer, simulated engine.

    python -m benchmarks.idle_latency [JOBS]

Each job is posted alone and long-polled with ?wait=; the engine takes 1 ms, the rest is the queue:
HTTP twice, Postgres, the doorbell through Celery, the claim, the record, the poller.
"""

import json
import sys
import time

from benchmarks.stack import percentile, running_stack


def main() -> None:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seconds = []
    with running_stack(["--engine", "simulated"], ready_seconds=60) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        for number in range(jobs + 10):
            body = {"model": model, "prompt": f"job {number}", "max_tokens": 1}
            started = time.perf_counter()
            job = client.post("/v1/jobs", json=body).raise_for_status().json()
            answer = client.get(f"/v1/jobs/{job['id']}", params={"wait": 30}).json()
            seconds.append(time.perf_counter() - started)
            if answer["state"] != "succeeded":
                raise SystemExit(f"job {job['id']} is {answer['state']}: {answer['error']}")
            time.sleep(0.05)  # idle again
    measured = [1000 * s for s in seconds[10:]]  # the first ten warm the connections up
    figures = {f"p{int(100 * s)}_ms": round(percentile(measured, s), 1) for s in (0.5, 0.9, 0.99)}
    print(json.dumps({"name": "idle_latency", "jobs": jobs, **figures}))
    print(f"idle latency p50: {percentile(measured, 0.5):.1f} ms")


if __name__ == "__main__":
    main()
