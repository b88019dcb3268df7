"""What must hold before a run: a check each, on every rank, and one table of what they found."""
