"""The LoRA family: LoRA, its variants and AdaLoRA, their inits, combining and optimizers.

config.py         LoraConfig
lora.py           LoRA itself
variants/         methods that are LoRA with one thing changed, AdaLoRA and X-LoRA among them
adapter.py        base class of adapters with two low-rank factors
plain.py          base class of methods that add the product unchanged: LoRA, aLoRA and others
attention.py      LoRA on the two weights of an attention module
parameters.py     LoRA on bare parameters: the experts of a mixture
tied.py           LoRA on layers that share their weight with the input embedding
low_rank.py       the product of the factors on each kind of layer
autograd.py       the product on linear layers, which saves only its input for backward
multi_adapter.py  one batch whose rows use different adapters
initialization/   initial values of the factors
combining/        combines several adapters into one
conversion.py     OLoRA, PiSSA and KaSA rewritten as plain LoRA
nearest.py        the LoRA that is closest to an adapter of any method
optimizers.py     LoRA-FA, LoRA+ and Riemannian preconditioning
family.py         what the records of the methods have in common
"""

from nbpeft.engine.methods.lora import lora
from nbpeft.engine.methods.lora.variants import (
    adalora,
    alora,
    arrow,
    bdlora,
    dora,
    kasa,
    mica,
    monteclora,
    qalora,
    velora,
    xlora,
)

__all__ = [
    "adalora",
    "alora",
    "arrow",
    "bdlora",
    "dora",
    "kasa",
    "lora",
    "mica",
    "monteclora",
    "qalora",
    "velora",
    "xlora",
]
