"""ShadowPEFT: a small network beside a decoder, whose state the blocks of the decoder read and advance.

config.py     ShadowConfig
network.py    the network for a model: its blocks, its sizes, where it comes from
losses.py     the losses of the network by itself
shadow.py     the adapter, and what a model has of it
cache.py      a cache of keys and values for both
detached.py   the network as a model of its own
"""

from nbpeft.engine.methods.shadow import shadow

__all__ = ["shadow"]
