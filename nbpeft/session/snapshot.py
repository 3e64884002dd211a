"""Builds the frozen ``ModelState`` of an adapted model, which panels display.

Values that need a walk over the model are cached until its adapters change; flags are always read again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbpeft.session.configs import label_of, summary_of
from nbpeft.state import AdapterState, MemoryState, ModelState, TrainState

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.runtime.manager import AdapterManager


@dataclass(frozen=True)
class _ModelFacts:
    """The properties of a model that do not change while its adapters are the same."""

    parameter_count: int
    base_trainable: int
    """Trainable parameters that belong to no adapter."""
    quantization: str


class Snapshots:
    """Builds the states of one model, with a cache of what did not change."""

    def __init__(self) -> None:
        self._adapters: dict[str, tuple[AdapterConfig, AdapterState]] = {}
        """For each adapter its config and a state, whose counts hold while the config is the same object."""
        self._model: _ModelFacts | None = None
        self._built: ModelState | None = None
        self._revision = -1
        self._scored: bool | None = None

    def forget(self) -> None:
        """Clears the cache, so that everything is counted again."""
        self._adapters.clear()
        self._model = None
        self._built = None

    def build(
        self,
        name: str,
        manager: AdapterManager,
        *,
        memory: MemoryState | None,
        training: TrainState | None,
        replaced: tuple[str, ...] = (),
    ) -> ModelState:
        """Returns the model's current state.

        Args:
            name: name of the model.
            manager: its manager.
            memory: the last measurement, for the state.
            training: the state of the last run, for the state.
            replaced: adapters that no longer have the weights of their last training.
        """
        built, (dtype, device) = self._built, _kind(manager.model)
        if built is not None and self._revision == manager.revision and (built.dtype, built.device) == (dtype, device):
            same = built.name == name and built.offloaded_count == _offloaded_count(manager)
            if same and built.memory is memory and built.training is training and built.replaced == replaced:
                return built
        elif built is not None and (built.dtype, built.device) != (dtype, device):
            self.forget()
        with manager.reading():
            self._revision = manager.revision
            fresh = self._fresh(name, manager, memory, training, dtype, device)
            self._built = replace(fresh, replaced=replaced) if replaced else fresh
        return self._built

    def _fresh(
        self,
        name: str,
        manager: AdapterManager,
        memory: MemoryState | None,
        training: TrainState | None,
        dtype: str,
        device: str,
    ) -> ModelState:
        changed = self._update_adapters(manager)
        adapters = tuple(self._adapter(adapter, manager) for adapter in manager.names)
        adapted = sum(item.parameter_count for item in adapters if item.trainable)
        if changed or self._model is None:
            self._model = _count(manager, adapted)
        return ModelState(
            name=name,
            class_name=type(manager.model).__name__,
            dtype=dtype,
            device=device,
            parameter_count=self._model.parameter_count,
            trainable_count=self._model.base_trainable + adapted,
            adapters=adapters,
            active=_effective(manager),
            enabled=manager.enabled,
            merged=manager.merged,
            memory=memory,
            training=training,
            quantization=self._model.quantization,
            offloaded_count=_offloaded_count(manager),
            generates=hasattr(manager.model, "generate"),
            scored=training is None or self._is_scored(manager.model),
        )

    def _is_scored(self, model: nn.Module) -> bool:
        if self._scored is None:
            from nbpeft.scoring.rows import is_scored_by_default

            self._scored = is_scored_by_default(model)
        return self._scored

    def _update_adapters(self, manager: AdapterManager) -> bool:
        """Updates the cached properties of adapters; returns whether any changed."""
        old = self._adapters
        self._adapters = {
            name: old[name] if name in old and old[name][0] is config else (config, _counted(name, config, manager))
            for name, config in manager.configs.items()
        }
        return len(old) != len(self._adapters) or any(
            old.get(name) is not known for name, known in self._adapters.items()
        )

    def _adapter(self, name: str, manager: AdapterManager) -> AdapterState:
        from nbpeft.checkpoint import prompt_format

        form = prompt_format(manager.configs[name])
        return replace(
            self._adapters[name][1],
            trainable=any(parameter.requires_grad for parameter in manager.parameters(name)),
            active=name in _effective(manager),
            merged=name in manager.merged,
            scale=manager.scale(name),
            frozen=name in manager.frozen,
            unsaved=name in manager.unsaved,
            system=None if form is None else form.system or "",
        )


def _counted(name: str, config: AdapterConfig, manager: AdapterManager) -> AdapterState:
    """Returns the state of an adapter with its counts; its flags are not read yet."""
    paths = [*manager.layers_with(name)]
    paths += [path for path, module in manager.copies.items() if name in module.modules_to_save]
    parameters = manager.parameters(name)
    return AdapterState(
        name=name,
        method=label_of(config),
        module_count=len(paths),
        targets=tuple(sorted({path.rpartition(".")[2] for path in paths})),
        parameter_count=sum(parameter.numel() for parameter in parameters),
        byte_count=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        summary=summary_of(config),
        trainable=False,
        active=False,
        merged=False,
    )


def _effective(manager: AdapterManager) -> tuple[str, ...]:
    """Returns the adapters that affect the model's output: while some are merged, only these."""
    return manager.merged or (manager.active if manager.enabled else ())


def _offloaded_count(manager: AdapterManager) -> int:
    """Returns the number of adapters in the model's pool that are not on the model."""
    return 0 if manager.provider is None else manager.provider.offloaded_count


def _count(manager: AdapterManager, adapted: int) -> _ModelFacts:
    from nbpeft.engine.tree.model_tree import parameter_counts

    trained, total = parameter_counts(manager.model)
    backends = sorted({layer.backend.name for layer in manager.layers.values()} - {"dense"})
    return _ModelFacts(total, trained - adapted, ", ".join(backends))


def _kind(model: nn.Module) -> tuple[str, str]:
    """Returns the dtype and device of a model's first floating-point parameter."""
    first = None
    for parameter in model.parameters():
        first = first if first is not None else parameter
        if parameter.is_floating_point():
            first = parameter
            break
    if first is None:
        return "–", "–"
    return str(first.dtype).removeprefix("torch."), str(first.device)
