"""Warnings about a config that is valid but probably not what the user meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence, Set

from torch import nn

from nbpeft.engine.contract.adapter import TASK_HEADS, Adapter, AdapterConfig, TaskType
from nbpeft.engine.contract.registry import resolve_layer_kind
from nbpeft.engine.tree.model_tree import Site, bare_modules, embedding_of, parameter_counts, reader_of
from nbpeft.errors import PeftWarning, TargetError, few, shown


def guessed_heads(config: AdapterConfig) -> tuple[str, ...]:
    """Names of heads that a task adds to ``modules_to_save``; the model may not have them."""
    return TASK_HEADS.get(TaskType(config.task_type), ()) if config.task_type else ()


def missing_head_message(missing: Sequence[str]) -> str:
    """The message that a model has none of the usual heads of its task."""
    return (
        f"the model has no module {' or '.join(missing)}: if its head has another name, it is neither trained nor "
        "saved unless modules_to_save names it"
    )


def warn_of_uncalled(sites: Sequence[Site], adapted: Set[str]) -> None:
    """Warns once about an adapter without effect, because the module around its layer only reads the layer's weight.

    Args:
        sites: sites of the layers that get an adapter.
        adapted: their paths.
    """
    for site in sites:
        reader, path = reader_of(site), site.path.rpartition(".")[0]
        if reader is not None and path not in adapted:
            warnings.warn(
                f"the adapter at {site.path} has no effect: {type(reader).__name__:.60} reads the layer's weight "
                f"without calling the layer; target {path} instead, or exclude {site.attribute}",
                stacklevel=5,
            )
            return


def warn_of_both(config: AdapterConfig) -> None:
    """Warns of modules that are named as targets and as modules to train as a whole: they get no adapter."""
    targets = getattr(config, "target_modules", None)
    named = () if targets is None or isinstance(targets, str) else targets
    both = sorted({*named} & {*(getattr(config, "modules_to_save", None) or ())})
    if both:
        one = len(both) == 1
        warnings.warn(
            f"{few(both)} {'is' if one else 'are'} in target_modules and in modules_to_save: trained as a whole, "
            f"{'it gets' if one else 'they get'} no adapter",
            stacklevel=4,
        )


def warn_of_ensured(tied: Collection[str], changed: Set[str]) -> None:
    """Warns if ``ensure_weight_tying`` has no effect.

    Args:
        tied: paths of the input embedding and the modules that share its weight; empty if none do.
        changed: paths of modules that are adapted or trained as a whole.
    """
    if not tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights: no tied modules were found in the "
            "model",
            stacklevel=6,
        )
    elif changed.isdisjoint(tied):
        warnings.warn(
            f"ensure_weight_tying=True but no tied modules are added: {' and '.join(tied)} are neither in "
            "target_modules nor in modules_to_save",
            stacklevel=6,
        )


def warn_of_tied(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], changed: Set[str], config: AdapterConfig
) -> None:
    """Warns if an adapter changes an embedding or head that shares its weight with another module.

    Args:
        model: the base model.
        modules: path and module of everything in it.
        changed: paths that get separate adapter tensors or are trained as a whole.
        config: config of the adapter.
    """
    weight = getattr(embedding_of(model), "weight", None)
    users: dict[int, str] = {}
    for path, module in modules if isinstance(weight, nn.Parameter) else ():
        if module._parameters.get("weight") is weight and (id(module) not in users or path in changed):
            users[id(module)] = path
    paths = list(users.values())
    own = [path for path in paths if path in changed]
    if not own or len(paths) < 2:
        return
    asked = getattr(config, "ensure_weight_tying", None)
    unset = "`ensure_weight_tying` is not set to True"
    why = {None: ": no implementation exists to tie the adapters", False: f": {unset}"}.get(asked, "")
    which = f"only {' and '.join(own)}" if len(own) < len(paths) else "each separately"
    warnings.warn(
        f"{' and '.join(paths)} share one weight (tie_word_embeddings) and the adapter changes {which}: they differ "
        f"while it is active, and merging gives them separate weights{why}",
        stacklevel=6,
    )


def warn_of_experts(model: nn.Module, config: AdapterConfig, taken: Callable[[str], bool]) -> None:
    """Warns if ``"all-linear"`` adapts no stacked weights, although the model has some (experts of a mixture).

    Args:
        model: the base model, with or without adapters.
        config: the config.
        taken: whether a parameter is adapted.
    """
    stacked = {
        f"{path}.{name}".removeprefix("."): parameter
        for path, module in bare_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if _is_stacked(module, parameter)
    }
    if not stacked or any(map(taken, stacked)):
        return
    share = sum(parameter.numel() for parameter in set(stacked.values())) / parameter_counts(model)[1]
    advice = " unless target_parameters names them" if hasattr(config, "target_parameters") else ""
    which = few(stacked, 1, quoted=False)
    warnings.warn(
        f"target_modules='all-linear' adapts linear layers only: the experts ({which}, {share:.0%} of the parameters) "
        f"are stacked weights and are not adapted{advice}",
        stacklevel=5,
    )


def warn_of_experts_along(added: Sequence[tuple[int, int]]) -> None:
    """Warns how many parameters the experts add to an "all-linear" adapter, because they were linear layers.

    Args:
        added: (number of matrices, number of adapter parameters) of each target.
    """
    total, experts = sum(count for _, count in added), sum(count for matrices, count in added if matrices > 1)
    if not experts:
        return
    warnings.warn(
        f"target_modules='all-linear' includes the experts, {experts:,} of the adapter's {total:,} parameters "
        f"({experts / total:.0%}); exclude_modules=['experts'] leaves them out",
        stacklevel=5,
    )


def _is_stacked(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter stacks the weights of several linear maps and is not in a layer of ``torch.nn``."""
    return parameter.ndim == 3 and parameter.shape[0] > 1 and not type(owner).__module__.startswith("torch.nn.")


def warn_about_config(
    config: AdapterConfig,
    adapter_class: type[Adapter],
    modules: Sequence[tuple[str, nn.Module]],
    *,
    strict: bool,
    unused_exclude: bool = False,
) -> None:
    """Warns about options without effect, and passes on the method's own warnings about these layers.

    Args:
        config: the config.
        adapter_class: adapter class of its method.
        modules: path and module of everything it adapts.
        strict: refuse patterns that match nothing instead.
        unused_exclude: whether ``exclude_modules`` names nothing in the model.

    Raises:
        TargetError: a pattern matches nothing, if strict.
    """
    unmatched = config.unused_patterns([path for path, _ in modules])
    excluded = getattr(config, "exclude_modules", None)
    excluded_text = shown(excluded if excluded is None or isinstance(excluded, str) else sorted(excluded), 200)
    unused = (
        f"You have passed exclude_modules={excluded_text} but no modules were excluded: it matches none of the model"
        if unused_exclude
        else ""
    )
    for note, category in ((unmatched, RuntimeWarning), (unused, UserWarning)):
        if note and strict:
            raise TargetError(note)
        if note:
            warnings.warn(note, category, stacklevel=4)
    kinds = [(path, module, kind) for path, module in modules if (kind := resolve_layer_kind(module)) is not None]
    for note in adapter_class.config_warnings(config, kinds):
        warnings.warn(note, PeftWarning, stacklevel=4)
