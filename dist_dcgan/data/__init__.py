"""Sample order, reading of shards, batches on the device."""
