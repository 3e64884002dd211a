"""More adapters than fit on the device: a pool, its caches, and swaps in place."""
