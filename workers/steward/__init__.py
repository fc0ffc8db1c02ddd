"""The steward: sweeps, rescues, expires and tidies up. Any number may run; the broker may be down."""
