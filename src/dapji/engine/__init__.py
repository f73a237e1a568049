"""TODO: one paragraph."""
