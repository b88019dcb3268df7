"""Checks before a run, executed on every rank and reported in one table."""
