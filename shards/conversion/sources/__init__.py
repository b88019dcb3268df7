"""Where encoded images come from."""
