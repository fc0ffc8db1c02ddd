"""The drain: jobs flow from Postgres through the engine and back, without a barrier.

`core.py` ties it together; `planner.py` decides (pure), `feeder.py` claims and feeds, `slots.py`
keeps adapters, `recorder.py` writes, `lease.py` beats, `aborts.py` carries cancels to the engine.
"""
