"""The loop, the step, what is saved and what is logged."""
