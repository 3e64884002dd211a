"""ShadowPEFT: a small network next to a decoder, with a state that the decoder's blocks read and update.

config.py     ShadowConfig
network.py    finds a model's blocks, and decides which network the model gets
recipe.py     how the network is built, and with which tensors it begins
token_network.py  the network for diffusion transformers
flux_network.py   the network for Flux 2
losses.py     the losses of the network alone
shadow.py     the adapter, and PEFT's names of its parts on a model
cache.py      a cache of keys and values for both
detached.py   the network as a separate model
"""

from nbpeft.engine.methods.shadow import shadow

__all__ = ["shadow"]
