"""The REST API: it commits jobs, rings, and reads answers back. It never talks to an engine."""
