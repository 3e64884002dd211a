"""A sum of Kronecker products, whose number of terms is the rank.

y = W x + s Σ_k (A_k ⊗ B_k) dropout(x)        A (r, out / size, in / size), B (r, size, size), s = alpha / r
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nbpeft.errors import ConfigError
from nbpeft.methods import Adapter, Listing, MethodConfig, Paddable, Rescales, register


@dataclass
class KronSumConfig(MethodConfig):
    r: int = 4
    size: int = 8
    alpha: float = 8.0
    dropout: float = 0.0

    counts = ("r", "size")
    shares = ("dropout",)

    def scaling_at(self, path):
        return self.alpha / self.r


@register(
    KronSumConfig,
    peft_type="KRONSUM",
    label="KronSum",
    default_targets=lambda model_type: "all-linear",
    sample_configs={"small": {"r": 2, "size": 4}, "dropout": {"r": 3, "size": 4, "dropout": 0.1}},
    listing=Listing(summary=lambda config: {"r": str(config.r), "size": str(config.size)}),
)
class KronSum(Adapter, Rescales, Paddable):
    from_config = {"scaling": "scaling_at", "dropout": "dropout"}  # noqa: RUF012
    rank_axes = {"kron_A": 0, "kron_B": 0}  # noqa: RUF012

    @classmethod
    def parameter_shapes(cls, config, path, module, kind):
        (columns, rows), size = kind.features(module), config.size
        if not kind.is_linear or columns % size or rows % size:
            raise ConfigError(f"{path}: size must divide {columns} and {rows} features of a linear layer", field="size")
        return {"kron_A": (config.r, rows // size, columns // size), "kron_B": (config.r, size, size)}

    @classmethod
    def initial_tensors(cls, config, site):
        return {name: site.new(shape).normal_(std=0.1 * (name == "kron_B")) for name, shape in site.shapes.items()}

    def forward(self, x, base_output, base):
        x = F.dropout(x.to(self.kron_B.dtype), self.dropout, self.training).unflatten(-1, (-1, self.kron_B.shape[2]))
        inner = torch.einsum("...ij,rqj->...riq", x, self.kron_B)
        return torch.einsum("...riq,roi->...oq", inner, self.kron_A).flatten(-2) * self.scaling

    def delta_weight(self, weight, base):
        return torch.einsum("roi,rqj->oqij", self.kron_A, self.kron_B).reshape(weight.shape).detach() * self.scaling
