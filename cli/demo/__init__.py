"""What `lorry up` serves when no model is named: a small real base, three adapters, prompts."""
