"""More adapters than fit on the device: a pool, its caches, and swaps in place.

Door, what other rooms import:

    hotswap.py  Hot-swapping saved adapters, under PEFT's names
    pool.py     AdapterPool: more adapters on one base model than fit on its device

Inside:

    device_cache.py  The adapters of a pool that are on its model's device: their size, which may be evicted, and
                     swapping them in
    host_cache.py    Adapters in host memory: read from files, made ready for a model, and kept within a limit
"""
