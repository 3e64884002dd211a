"""The commands that make a new adapter of others, and that put another in the place of one."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, AdapterExistsError, ConfigError, did_you_mean
from nbpeft.interrupts import HeldInterrupts
from nbpeft.names import COMBINATION_TYPES
from nbpeft.session.answering import Asked, Batch, Prompt, check_finite, evaluating, first_answer
from nbpeft.session.base import SessionBase
from nbpeft.session.book import Entry
from nbpeft.session.checks import adapter_name, place_of, weights_of
from nbpeft.session.combined import CombineResult, SwapResult
from nbpeft.session.files import folder_hint
from nbpeft.session.handles import uncompiled
from nbpeft.session.tokenizers import Tokenizers

if TYPE_CHECKING:
    from torch import nn

    ModelLike = nn.Module | str | None

_RANKED = tuple(name for name in COMBINATION_TYPES if name == "exact" or name.endswith("svd"))
_PRUNING = ("ties", "dare_", "magnitude_prune")
_LINEAR_NOTE = 0.05


class CombiningCommands(SessionBase):
    """Combining adapters and hot-swapping them."""

    def __init__(self) -> None:
        super().__init__()
        self._tokenizers = Tokenizers()
        self._combined: dict[tuple[str, str], weakref.ref[Any]] = {}

    def combine(
        self,
        weights: Mapping[str, float],
        *,
        as_name: str,
        type: str = "exact",
        rank: int | None = None,
        density: float | None = None,
        majority_sign: str = "total",
        clamp: float | None = None,
        seed: int | None = None,
        replace: bool = False,
        model: ModelLike = None,
    ) -> CombineResult:
        """Makes a new adapter of a weighted combination of others; it starts frozen and inactive.

        Doing it again under the same name remakes the combination; an adapter that came about in
        another way, or was trained since, is only replaced when asked to.

        Args:
            weights: adapter -> weight; negative ones subtract.
            as_name: the new adapter.
            type: ``exact`` (the default) is the true weighted sum of what the adapters add, cut
                to ``rank`` by a truncated SVD, or whole without one. The others are PEFT's, under
                their names; ``linear`` and what is built on it mix factors and differ from the sum.
            rank: of the result, for ``exact``, ``svd`` and the types that end in ``_svd``.
            density: share of the entries that TIES, DARE and magnitude pruning keep.
            majority_sign: how TIES elects a sign: ``total`` or ``frequency``.
            clamp: quantile in (0, 1] at which entries are clamped, for types with an SVD.
            seed: of the entries that DARE drops; None: as torch's generator stands.
            replace: replace any adapter of that name.
            model: an adapted model.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterExistsError: the name is taken.
            AdapterError: they cannot be combined.
            ConfigError: an option is impossible or means nothing for this type.
        """
        recipe = recipe_of(type, rank=rank, density=density, majority_sign=majority_sign, clamp=clamp)
        weights = weights_of(weights)
        adapter_name(as_name)
        entry = self._book.get_for("combine", model)
        entry.manager.require_reachable(*weights)
        if not weights:
            raise AdapterError("no adapters to combine: name at least one")
        with self._command(f"combining {', '.join(weights)}", slow=True) as notes, seeded(seed):
            remade = self._may_replace(entry, as_name, weights, replace)
            combined = self._make(entry, weights, as_name, recipe, remade)
            self._combined[entry.name, as_name] = weakref.ref(entry.manager.configs[as_name])
            if type == "linear" and combined.relative_error > _LINEAR_NOTE:
                notes.append("linear mixes the factors of one adapter with another's; type exact keeps the true sum")
            state = entry.state()
            return CombineResult(
                entry.name,
                tuple((name, float(weight)) for name, weight in weights.items()),
                next(item for item in state.adapters if item.name == as_name),
                combined.combination_type,
                combined.rank,
                combined.relative_error,
                combined.energy_kept,
                combined.layers,
                state,
                remade,
                tuple(notes),
            )

    def swap(
        self,
        path: str | os.PathLike[str],
        *,
        into: str | None = None,
        validate: Callable[[nn.Module], object] | None = None,
        check_prompt: str | None = None,
        tokenizer: Any = None,
        chat: bool | None = None,
        max_new_tokens: int = 32,
        model: ModelLike = None,
    ) -> SwapResult:
        """Puts a saved adapter in the place of one that is on the model, which keeps its name.

        Everything is checked before the first byte is copied, and a compiled model that was
        prepared for it goes on without compiling again.

        Args:
            path: a folder or a hub id.
            into: the adapter to replace; the active one if left out.
            validate: called with the model when the new adapter is in place and alone active; if it
                returns False or raises, the old one is put back, bit for bit.
            check_prompt: is answered before and after; an adapter whose weights or output
                are not finite is refused as by ``validate``.
            tokenizer: for ``check_prompt``; the one given before if left out.
            chat: see ``compare``.
            max_new_tokens: length of the answers to ``check_prompt``.
            model: an adapted model; give the compiled one where it is compiled.

        Raises:
            HotSwapError: the new adapter cannot take the place, or was refused.
            CheckpointError: there is no checkpoint, it is damaged, or belongs to another base.
            UnknownAdapterError: there is no such adapter.
        """
        from nbpeft.model import hotswap_adapter

        place = place_of(path, "swap")
        entry = self._adapted("swap", model)
        name = into if into is not None else _only_active(entry)
        entry.manager.require(name)
        target: Any = model if uncompiled(model) is not model else entry.model
        check = None
        if check_prompt is not None:
            check = _PromptCheck(entry, name, self._batch(entry, [check_prompt], tokenizer, chat), max_new_tokens)
        with self._command(f"swapping {name!r}", slow=True) as notes, folder_hint(place), evaluating(entry.model):
            before = check.answer([name]) if check is not None else ""
            started = time.perf_counter()
            judge = None if check is None and validate is None else _Judge(check, validate)
            swapped = hotswap_adapter(target, place, name, validate=judge)
            seconds = time.perf_counter() - started - (judge.seconds if judge is not None else 0.0)
            entry.asked.pop(name, None)
            self._combined.pop((entry.name, name), None)
            self._stale = True
            state = entry.state()
            return SwapResult(
                entry.name,
                place,
                next(item for item in state.adapters if item.name == name),
                swapped.layers,
                swapped.zeroed,
                swapped.reset,
                seconds,
                state,
                check_prompt or "",
                before,
                judge.answer if judge is not None else "",
                tuple(notes),
            )

    def _may_replace(self, entry: Entry, name: str, weights: Mapping[str, float], replace: bool) -> bool:
        """Whether an adapter of that name gives way.

        Raises:
            AdapterExistsError: there is one and it stays.
        """
        manager = entry.manager
        if name not in manager.configs:
            return False
        if name in weights:
            raise AdapterExistsError(f"{name!r} is one of the adapters that are combined; take another name", name=name)
        known = self._combined.get((entry.name, name))
        same = known is not None and known() is manager.configs[name]
        if replace or (same and name in manager.frozen):
            return True
        raise AdapterExistsError(
            f"{entry.name} has an adapter {name!r} already; take another name, or replace it (--replace)", name=name
        )

    def _batch(self, entry: Entry, prompts: Sequence[Prompt], tokenizer: Any, chat: bool | None) -> Batch:
        """Prompts as the adapters of a model were trained on text, unless it is said how."""
        base = entry.manager.model
        asked = False if chat is None and entry.plain else chat
        return Batch.of(prompts, self._tokenizers.choose(base, tokenizer), base, chat=asked)

    def _make(self, entry: Entry, weights: Mapping[str, float], name: str, recipe: Any, replaces: bool) -> Any:
        """Combines; the adapter it replaces goes when the new one stands, and hands its place on."""
        from nbpeft.model.combining import combine_adapters

        manager, made = entry.manager, free_name(name, entry.manager.names) if replaces else name
        with HeldInterrupts():
            combined = combine_adapters(manager, tuple(weights), tuple(weights.values()), made, recipe)
            if not replaces:
                return combined
            try:
                with manager.transaction():
                    if name in manager.active:
                        manager.activate([made if other == name else other for other in manager.active])
                    manager.remove(name)
                    manager.rename(made, name)
            except BaseException:
                with HeldInterrupts(to_the_end=True):
                    manager.remove(made)
                raise
            entry.asked.pop(name, None)
            return combined


class _PromptCheck:
    """Answers one prompt with one adapter."""

    def __init__(self, entry: Entry, name: str, batch: Batch, max_new_tokens: int) -> None:
        self._entry, self._name, self._batch, self._tokens = entry, name, batch, max_new_tokens

    def answer(self, rows: list[str] | None = None) -> str:
        """What the adapter of the one row answers; what acts now if None."""
        return first_answer(self._entry.model, self._batch, Asked(rows, self._tokens))

    def judge(self) -> str:
        """The answer of the adapter, which is active alone.

        Raises:
            AdapterError: it holds or gives numbers that are not finite.
        """
        check_finite(self._entry.model, self._name, self._batch)
        return self.answer()


class _Judge:
    """The validation of a swap: the prompt's check, then the caller's."""

    def __init__(self, check: _PromptCheck | None, validate: Callable[[Any], object] | None) -> None:
        self._check, self._validate = check, validate
        self.answer, self.seconds = "", 0.0

    def __call__(self, model: Any) -> object:
        started = time.perf_counter()
        try:
            if self._check is not None:
                self.answer = self._check.judge()
            return None if self._validate is None else self._validate(model)
        finally:
            self.seconds = time.perf_counter() - started


def recipe_of(
    type: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    clamp: float | None = None,
) -> dict[str, Any]:
    """How to combine, from the options of ``combine``.

    Raises:
        ConfigError: an option is impossible or one that the type would not look at, or there is no such type.
    """
    if type not in COMBINATION_TYPES:
        near = did_you_mean(str(type), COMBINATION_TYPES)
        raise ConfigError(f"type {type!r} is unknown; choose from {', '.join(COMBINATION_TYPES)}.{near}")
    for option, value in (("rank", rank), ("clamp", clamp)):
        if value is not None and type not in _RANKED:
            near = f"; {type}_svd takes one" if f"{type}_svd" in _RANKED else ""
            raise ConfigError(f"{option} means nothing for type {type!r}, which keeps the adapters' ranks{near}")
    if density is not None and not type.startswith(_PRUNING):
        raise ConfigError(f"density means nothing for type {type!r}, which drops nothing; ties and dare take one")
    return {
        "combination_type": type,
        "svd_rank": rank,
        "svd_clamp": clamp,
        "density": density,
        "majority_sign_method": majority_sign,
    }


def _only_active(entry: Entry) -> str:
    active = entry.manager.active
    if len(active) != 1:
        names = ", ".join(entry.manager.names)
        raise AdapterError(f"say which adapter is to be replaced (into, --into): {names}")
    return active[0]


def free_name(name: str, taken: tuple[str, ...]) -> str:
    """A name that no adapter has: this one, or one like it."""
    free, number = name, 2
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds torch inside the block and puts its generators back."""
    if seed is None:
        yield
        return
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}; expected a whole number of at most 64 bits")
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
