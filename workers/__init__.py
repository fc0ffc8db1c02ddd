"""The GPU worker and the steward: everything that runs jobs and looks after them."""
