"""Networks, batch norm across ranks, losses."""
