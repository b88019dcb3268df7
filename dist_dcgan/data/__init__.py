"""Which sample when, pixels from shards, batches on the device."""
