"""More adapters than fit on the device: a pool, its caches, and in-place swaps.

Door, what other rooms import:

    hotswap.py  PEFT's functions for hot-swapping saved adapters
    pool.py     AdapterPool: more adapters on one base model than fit on its device

Inside:

    device_cache.py  The pool's LRU cache of adapters on the model's device
    host_cache.py    The pool's LRU cache of adapters in host memory, and reading them from files
"""
