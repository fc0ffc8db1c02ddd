"""Pure rules and vocabulary of Lorry: no I/O, no clock, no environment at import."""
