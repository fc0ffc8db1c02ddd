"""`lorry up`: Postgres, Valkey, API, steward and one worker as the children of one process."""
