"""The LoRA family: LoRA, its variants and AdaLoRA, their inits, combining and optimizers.

config.py         LoraConfig
lora.py dora.py alora.py mica.py bdlora.py qalora.py kasa.py arrow.py velora.py monteclora.py adalora.py   the methods
xlora.py xlora_config.py xlora_classifier.py   a mixture of LoRA adapters, weighed anew for each token
together.py       the adapters of all layers, for what is computed over them
adapter.py        what they share: two low-rank factors
plain.py          a product that is added as it is: of LoRA and aLoRA
attention.py      LoRA on the two weights of an attention module
low_rank.py       the product of the factors on each kind of layer
autograd.py       the product on linear layers, keeping nothing but its input for backward
multi_adapter.py  one batch served by several adapters
inits.py          how the factors start
combining/        one adapter of several
conversion.py     OLoRA and PiSSA written as plain LoRA
nearest.py        the LoRA that comes closest to an adapter of any method
optimizers.py     LoRA-FA and LoRA+
family.py         what the records of the methods share
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
