"""Trainable tokens: rows of an embedding, for tokens that are new or mean something new.

    y = E'[ids]        E' is E with the rows of some tokens replaced by trained ones

The trained rows are stored themselves, not as differences, so they have the same meaning on a base whose rows
of new tokens were initialized differently. They are initialized with the base's rows. An output head that shares the
embedding's weight also uses the trained rows, and has no tensors of its own. If a config names other tokens for the
head, or only the head, the head has its own rows.

It is a separate method (``TrainableTokensConfig``), and a companion of other methods, whose configs enable it with
``trainable_token_indices``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import checked_names
from nbpeft.engine.config.targets import matches_segment_names, no_match
from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterConfig,
    AdapterSite,
    FusesAdd,
    HotSwaps,
    MergesInPlace,
    NotConvertible,
    PeftType,
    TiedAdapter,
    Untargeted,
    source_of,
)
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import parameter_of
from nbpeft.engine.contract.combination import Member
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import FileFormat, Listing, OwnKinds, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import Part, register, resolve_backend, resolve_layer_kind
from nbpeft.engine.tree.model_tree import embedding_of
from nbpeft.errors import AdapterError, ConfigError, TargetError, shown

ROWS = "trainable_tokens_delta"
_FIELD = "trainable_token_indices"
_USUAL_NAME = "embed_tokens"

Modules = Sequence[tuple[str, nn.Module]]


@dataclass
class TrainableTokensConfig(AdapterConfig):
    """Config of trainable tokens. Field names and defaults are PEFT's.

    Attributes:
        token_indices: ids of the tokens to train.
        target_modules: names of the embeddings; the model's input embedding if None.
        init_weights: start as the embedding's own rows; False for random ones.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = field(default=None)
    init_weights: bool = field(default=True)

    checked_apart: ClassVar[tuple[str, ...]] = ("token_indices", "target_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TRAINABLE_TOKENS")
        checked_names("target_modules", self.target_modules)

    def fill_in(self, model_type: str | None) -> None:
        """Refuses to train no token."""
        if isinstance(self.token_indices, Sequence) and not self.token_indices:
            raise ConfigError("token_indices is empty: name the tokens whose rows are trained", field="token_indices")

    @property
    def trainable_token_indices(self) -> Any:
        """The same as the field of other methods: ids, or name of an embedding -> ids."""
        if self.target_modules is None:
            return self.token_indices
        names = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        return dict.fromkeys(names, self.token_indices)


@dataclass(frozen=True)
class TokenRows:
    """The settings of one module's trained rows.

    Attributes:
        indices: the rows.
        init_weights: whether they start as the embedding's.
        companion: whether the config of another method enables them.
        tied: whether the rows are shared with another module, which owns them.
    """

    indices: tuple[int, ...]
    init_weights: bool
    companion: bool
    tied: bool = False


class _Companion:
    """Finds the embeddings and heads whose rows a config trains; see ``registry.Companion``."""

    field = _FIELD
    file_keys: ClassVar[Mapping[str, str]] = {ROWS: f"token_adapter.{ROWS}"}

    def __call__(self, model: nn.Module, config: Any, modules: Modules) -> Mapping[str, Part]:
        wanted = getattr(config, _FIELD, None)
        if not wanted:
            return {}
        named = wanted if isinstance(wanted, Mapping) else {_input_embedding(model, modules): wanted}
        starts = bool(getattr(config, "init_weights", True))
        own = isinstance(config, TrainableTokensConfig)
        field = "token_indices" if own else _FIELD
        found: dict[str, TokenRows] = {}
        seen: dict[int, str] = {}
        for name, indices in named.items():
            matching = [(path, module) for path, module in modules if matches_segment_names(path, [name])]
            if not matching:
                raise no_match([name], [path for path, _ in modules], what="target_modules" if own else _FIELD)
            for path, module in matching:
                if seen.setdefault(id(module), path) == path:
                    found[path] = TokenRows(_checked(path, module, indices, field), starts, not own)
        return _with_tied(model, config, found, modules)

    def combine(self, parts: Mapping[str, Sequence[tuple[Member, float]]]) -> tuple[Any, dict[str, dict[str, Tensor]]]:
        """Sums the changes of each row that any of the adapters trains; see ``registry.Companion``."""
        tokens: dict[str, list[int]] = {}
        tensors: dict[str, dict[str, Tensor]] = {}
        for path, members in parts.items():
            rows: list[Any] = [(member.adapter, member.scale * weight) for member, weight in members]
            tensors[path] = {}
            if all(source_of(adapter) is not None for adapter, _ in rows):
                continue  # a head that follows the embedding
            tokens[path] = list(dict.fromkeys(token for adapter, _ in rows for token in adapter.token_list))
            base = members[0][0].base
            _check_combined(path, tokens, {other: parts[other][0][0].base.module for other in tokens})
            total = _table(base.weight(), base)[tokens[path]].to(rows[0][0].rows.dtype)
            for adapter, factor in rows:
                places = [tokens[path].index(token) for token in adapter.token_list]
                total[places] += (adapter.rows - adapter.frozen_rows.to(total.dtype)) * factor
            tensors[path] = {ROWS: total}
        return tokens, tensors


_NAMES = PeftNames(
    "trainable_tokens_delta",
    "token_indices trainable_tokens_original",
    layer="TrainableTokensLayer",
    attributes={
        "token_indices": "token_list",
        "trainable_tokens_original": "frozen_rows",
    },
)
_REQUESTED = replace(_NAMES, container="token_adapter")
"""PEFT's names of rows that the config of another method enables."""


@register(
    TrainableTokensConfig,
    peft_type="TRAINABLE_TOKENS",
    label="trainable tokens",
    listing=Listing(
        when="new tokens: trains only their embeddings",
        summary=lambda config: {"tokens": str(len(config.token_indices))},
        listed_with={"token_indices": [0]},
    ),
    sample_configs={"tokens": {"token_indices": [0, 2, 5]}},
    shares=SharedTensors(companion=_Companion()),
    files=FileFormat(prefix="trainable_tokens_"),
    kinds=OwnKinds(quantized=False, linear=False),
)
class TrainableTokens(Adapter, TiedAdapter, Untargeted, NotConvertible, FusesAdd, MergesInPlace, HotSwaps):
    """Trained rows of one embedding or of the head that shares its weight.

    Attributes:
        source: the adapter that has the rows, where this one is tied to it.
    """

    reads_weight: ClassVar[bool] = True
    unconvertible: ClassVar[str] = (
        "it trains rows of an embedding, as LoRA does along with its own with trainable_token_indices"
    )
    peft: PeftNames = _NAMES  # type: ignore[misc]

    tokens: Tensor
    sorted_indices: Tensor
    order: Tensor
    _indices: tuple[int, ...]
    own_base: BaseLayer

    @classmethod
    def parameter_shapes(cls, config: TokenRows, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The rows, (tokens, features), unless they are tied."""
        inside, outside = kind.features(module)
        return {} if config.tied else {ROWS: (len(config.indices), outside if kind.takes_ids else inside)}

    @classmethod
    def initial_tensors(cls, config: TokenRows, site: AdapterSite) -> Mapping[str, Tensor]:
        base = site.base
        if not config.init_weights:
            return {name: site.new(shape, normal_) for name, shape in site.shapes.items()}
        rows = torch.tensor(config.indices, dtype=torch.long, device=base.device)
        return {name: _table(base.weight(), base)[rows].to(site.dtype) for name in site.shapes}

    def prepare(self, config: TokenRows, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """The tokens, also in their order."""
        device = None if site.base.device.type == "meta" else site.base.device
        rows = torch.tensor(config.indices, dtype=torch.long, device=device)
        ordered, order = rows.sort()
        for name, tensor in (("tokens", rows), ("sorted_indices", ordered), ("order", order)):
            self.register_buffer(name, tensor, persistent=False)
        self.bind(source=None, _indices=config.indices, own_base=site.base)
        if config.companion:
            self.bind(peft=_REQUESTED)

    def tie_to(self, source: Adapter) -> None:
        self.bind(source=source)

    @property
    def rows(self) -> Tensor:
        """The trained rows, (tokens, features)."""
        return (self.source or self).tensor(ROWS).to(self.tokens.device)

    @property
    def token_list(self) -> list[int]:
        """The tokens, in the order of the rows."""
        return [int(token) for token in self.tokens]

    @property
    def frozen_rows(self) -> Tensor:
        """The embedding's own rows of the tokens, (tokens, features), detached; while nothing is merged."""
        return _table(self.own_base.weight(), self.own_base)[self.tokens].detach()

    def swap_refusal(self) -> str:
        """Why it cannot be hot-swapped: its rows belong to its tokens."""
        return "trains rows of embeddings (trainable_token_indices)"

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer, fused: bool = False) -> Tensor:
        """The change of the output at the positions of trained tokens."""
        rows = self.rows
        frozen = _table(base.weight(), base)[self.tokens]
        change = rows - frozen.to(rows.dtype)
        if base.kind.takes_ids:
            delta = self._looked_up(x, change, base)
            return (base_output + delta).to(base_output.dtype) if fused else delta
        columns = F.linear(x.to(change.dtype), change)
        if not fused:
            return torch.zeros_like(base_output, dtype=columns.dtype).index_copy(-1, self.tokens, columns)
        total = base_output.index_select(-1, self.tokens) + columns
        return base_output.index_copy(-1, self.tokens, total.to(base_output.dtype))

    def _looked_up(self, ids: Tensor, change: Tensor, base: BaseLayer) -> Tensor:
        place = torch.searchsorted(self.sorted_indices, ids).clamp_max(len(self.sorted_indices) - 1)
        hit = (self.sorted_indices[place] == ids).unsqueeze(-1)
        kind: Any = base.kind
        padding = getattr(base.module, "padding_idx", None)  # looked up, it learns nothing: torch's rule
        row = self._indices.index(padding) if padding in self._indices else None
        found = F.embedding(self.order[place], change, padding_idx=row)
        return found * hit * kind.output_scale(base.module, change.dtype)

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        delta = torch.zeros_like(weight)
        rows = self.rows.detach().to(weight.dtype)
        _table(delta, base)[self.tokens] = rows - _table(weight, base)[self.tokens]
        return delta

    def add_to_(self, weight: Tensor, base: BaseLayer, scale: float) -> None:
        """Writes the trained rows, or the share ``scale`` of their change."""
        table = _table(weight, base)
        frozen = table[self.tokens]
        rows = self.rows.detach().to(weight.dtype)
        table[self.tokens] = rows if scale == 1.0 else frozen + (rows - frozen) * scale


def _table(weight: Tensor, base: BaseLayer) -> Tensor:
    """A canonical weight as (tokens, features), sharing its memory."""
    return weight.T if base.kind.takes_ids else weight


def _input_embedding(model: nn.Module, modules: Modules) -> str:
    embedding = embedding_of(model)
    inside = set() if embedding is None else {id(module) for module in embedding.modules()}
    return next(
        (path for path, module in modules if id(module) in inside and resolve_layer_kind(module) is not None),
        _USUAL_NAME,
    )


def _checked(path: str, module: nn.Module, indices: Any, field: str) -> tuple[int, ...]:
    kind, backend = resolve_layer_kind(module), resolve_backend(module)
    if kind is None or backend is None or not (kind.takes_ids or kind.is_linear):
        raise TargetError(f"{path} is a {type(module).__name__}: only rows of embeddings and heads can be trained")
    if backend.name != "dense":
        raise TargetError(f"{path} is quantized ({backend.name}): its rows cannot be trained")
    if not isinstance(indices, Sequence) or not indices or not all(type(index) is int for index in indices):
        raise ConfigError(f"{field} for {path} must be a list of token ids, not {shown(indices)}", field=field)
    rows = kind.features(module)[0 if kind.takes_ids else 1]
    wrong = next((index for index in indices if not 0 <= index < rows), None)
    if wrong is not None:
        raise ConfigError(
            f"{field}: {path} has {rows} rows and no row {wrong}; call resize_token_embeddings() first",
            field=field,
            index=wrong,
        )
    if len(set(indices)) < len(indices):
        raise ConfigError(f"{field} for {path} names a token more than once", field=field)
    return tuple(indices)


def _with_tied(model: nn.Module, config: Any, found: dict[str, TokenRows], modules: Modules) -> dict[str, Part]:
    """Adds modules that share the weight of one whose rows are trained.

    As in PEFT, they have separate rows if the config names different tokens for them, or does not name the embedding.
    """
    owners = {path: path for path in found}
    leaders: dict[int, str] = {}
    embedding = _input_embedding(model, modules)
    shared = next((_weight_id(module) for path, module in modules if path == embedding), 0)
    for weight in {_weight_id(module) for path, module in modules if path in found} - {0}:
        named = [path for path, module in modules if path in found and _weight_id(module) == weight]
        if len({found[path].indices for path in named}) > 1:
            if getattr(config, "ensure_weight_tying", False):
                raise ConfigError(
                    f"{' and '.join(named)} share one weight and have other tokens: {_FIELD} must name the same "
                    "ones for ensure_weight_tying=True",
                    field=_FIELD,
                )
        elif embedding in named or weight != shared:
            leaders[weight] = embedding if embedding in named else named[0]
            owners.update(dict.fromkeys(named, leaders[weight]))
    result = {path: _part(found[path], owners[path] if owners[path] != path else "") for path in found}
    placed = {id(module) for path, module in modules if path in found}
    for path, module in modules:
        leader = leaders.get(_weight_id(module))
        if leader is not None and id(module) not in placed and resolve_layer_kind(module) is not None:
            placed.add(id(module))
            result[path] = _part(found[leader], leader)
    return result


def _check_combined(path: str, tokens: Mapping[str, list[int]], modules: Mapping[str, nn.Module]) -> None:
    """Refuses other rows for the same tokens on a module that shares its weight: a file would tie them."""
    for other in tokens:
        shared = _weight_id(modules[other]) == _weight_id(modules[path])
        if other != path and shared and tokens[other] == tokens[path]:
            raise AdapterError(f"{other} and {path} share one weight and would have other rows for the same tokens")


def _weight_id(module: nn.Module) -> int:
    weight = parameter_of(module, "weight")
    return 0 if weight is None else id(weight)


def _part(rows: TokenRows, tied_to: str) -> Part:
    return Part(replace(rows, tied=bool(tied_to)), tied_to)
