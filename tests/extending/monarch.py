"""MoRe: a Monarch product of two block-diagonal factors (Tan et al. 2024, arXiv:2408.17383).

    y = W x + s L P R dropout(x)        R (blocks, r, in / blocks), L (blocks, out / blocks, r), s = alpha / r

P deals the outputs of each block of R out to all blocks of L, so that each output depends on each input.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nbpeft.errors import ConfigError
from nbpeft.methods import Adapter, Listing, MethodConfig, Rescales, register


@dataclass
class MoreConfig(MethodConfig):
    r: int = 4
    blocks: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    counts, shares = ("r", "blocks"), ("dropout",)

    def scaling_at(self, path):
        return self.alpha / self.r


@register(
    MoreConfig,
    peft_type="MORE",
    label="MoRe",
    default_targets=lambda model_type: "all-linear",
    sample_configs={"small": {"r": 2, "blocks": 2}, "dropout": {"r": 4, "blocks": 4, "dropout": 0.1}},
    listing=Listing(paper="arXiv:2408.17383", summary=lambda config: {"r": f"{config.r} × {config.blocks}"}),
)
class More(Adapter, Rescales):
    from_config = {"scaling": "scaling_at", "dropout": "dropout"}  # noqa: RUF012

    @classmethod
    def parameter_shapes(cls, config, path, module, kind):
        (columns, rows), n = kind.features(module), config.blocks
        if not kind.is_linear or columns % n or rows % n:
            raise ConfigError(f"{path} ({columns} to {rows} features) has no {n} equal blocks", field="blocks")
        return {"more_R": (n, config.r, columns // n), "more_L": (n, rows // n, config.r)}

    @classmethod
    def initial_tensors(cls, config, site):
        return {name: site.new(shape).normal_(std=0.02 * (name == "more_R")) for name, shape in site.shapes.items()}

    def product(self, x):
        n = len(self.more_R)
        inner = torch.einsum("...nk,nrk->...rn", x.unflatten(-1, (n, -1)), self.more_R).flatten(-2)
        return torch.einsum("...nr,nor->...no", inner.unflatten(-1, (n, -1)), self.more_L).flatten(-2) * self.scaling

    def forward(self, x, base_output, base):
        return self.product(F.dropout(x.to(self.more_R.dtype), self.dropout, self.training))

    def delta_weight(self, weight, base):
        return self.product(torch.eye(weight.shape[1]).to(self.more_R)).detach().T
