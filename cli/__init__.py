"""The `lorry` command: a thin hand on the API, the workers and the embedded stack."""
