"""Forecasting memory: whether a run will fit, before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbpeft._util.device_names import DEVICES, THIS_MACHINE, is_apple, named
from nbpeft.display.numbers import share, size
from nbpeft.errors import ConfigError, NbpeftError, did_you_mean
from nbpeft.names import BASE, BATCH_SIZE, SHORT_DTYPES, START
from nbpeft.session.configs import DEFAULT_METHOD, build_config, label_of, meaning, summary_of
from nbpeft.session.handles import uncompiled
from nbpeft.session.results.planning import PlanResult, PlanSettings, Room
from nbpeft.sweeps import largest_of

if TYPE_CHECKING:
    import torch

    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.memory.estimate import Setting, Weights
    from nbpeft.session.context import ConfigLike, ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel
    from nbpeft.state import MemoryPart

USUAL_FIELDS: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
"""Fields of the default adapter."""
_SETTINGS = (
    *("batch_size", "max_length", "dtype", "bits", "quant_type", "double_quant", "gradient_checkpointing"),
    *("optim", "training", "packing", "num_adapters", "device", "variable", "changes"),
    *("processes", "fsdp", "data", "tokenizer", "columns", "trainer_class", "loss_chunk_size", "recompute"),
    *("reference", "generation"),
)
_CHOSEN = ("batch_size", "max_length", "quantization", "gradient_checkpointing", "optim", "training")
"""Settings that a panel can change, and that planner and forecast name alike."""
_FIXED = ("packing", "num_adapters", "processes", "fsdp")
_WHOLE_NOTE = "complete logits are counted; nbpeft's own Trainer computes them in chunks"
_PAIRS_NOTE = (
    "each row is counted as two sequences, chosen and rejected; for an adapter that is trained already, "
    "reference='start' counts the copy of its weights"
)
_NO_BFLOAT16_NOTE = (
    "{} has no bfloat16: load the model in float16, which takes the same memory; quantized loading does so there"
)
_CUDA_NOTE = "allow 0.5 to 1 GB more for the CUDA context and fragmentation"


def plan(
    ctx: SessionContext, /, model: ModelLike = None, config: ConfigLike | None = None, **settings: Any
) -> PlanResult:
    """Forecast the memory of a run, by part, and whether a device has enough; nothing is loaded or changed.

    Args:
        model: a model or its name in the session, a transformers config, or the folder or hub id of one; only its
            config is read.
        config: the adapter's config, or its fields; by default that of the model's active adapter, or LoRA of rank 16
            on all linear layers.
        **settings: ``batch_size``, ``max_length`` and ``gradient_checkpointing`` (by default as in a training; see
            ``nbpeft.forecast``), ``dtype``, ``bits``, ``quant_type`` and ``double_quant`` (as for ``qlora``; by default
            those of the model), ``optim``, ``training``, ``packing``, ``num_adapters`` (number trained side by
            side; a sweep in ``changes`` sets it too), ``reference`` (``"start"`` counts a copy of the trained weights),
            ``generation`` (completions are generated before each step, as by ``grpo``), ``processes`` and ``fsdp``
            (memory of one of several processes, with DDP or with FSDP2), ``loss_chunk_size`` and ``recompute`` (as in
            ``nbpeft.Trainer``; a ``trainer_class`` of another library stores complete logits and activations),
            ``device`` (bytes, ``"16GB"``, ``"T4"`` or a torch device; by default this machine's), ``suggest=False`` for
            no suggestions if it does not fit. ``changes`` (fields by name) are differences from ``config``; another
            ``peft_type`` in ``changes`` means an adapter of that method with these fields. ``data`` (with ``tokenizer``
            and ``columns``, as for ``train``): rows whose longest one, or fullest packed sequence, determines the
            sequence length; ``max_length`` is then the length to which they are cut.

    Raises:
        ConfigError: a value is invalid, or the model cannot run without data.
        TargetError: the adapter does not fit the model.
    """
    suggest = settings.pop("suggest", True)
    for name in settings:
        if name not in _SETTINGS:
            known = (*_SETTINGS, "suggest")
            raise ConfigError(f"plan has no setting {name!r}.{did_you_mean(name, known)}", field=name)
    return memory_planner(ctx, model, config, **settings).plan(suggest=suggest)


def memory_planner(
    ctx: SessionContext,
    /,
    model: ModelLike = None,
    config: ConfigLike | None = None,
    *,
    changes: Mapping[str, Any] = {},
    variable: str | None = None,
    data: Any = None,
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    trainer_class: type[Any] | None = None,
    bits: int | None = None,
    quant_type: str = "nf4",
    **settings: Any,
) -> MemoryPlanner:
    """Return a planner for repeated forecasts with changing settings; see ``plan`` for the arguments."""
    tracked = None
    if model is None or (isinstance(model, str) and model in ctx.models.names):
        tracked = ctx.models.get(model, command="plan")
    elif not isinstance(model, str):
        tracked = ctx.models.find(uncompiled(model))
    if tracked is not None:
        source, name = tracked.manager.model, tracked.name
    else:
        source, name = uncompiled(model), model if isinstance(model, str) else type(model).__name__
    _check_reference(settings.get("reference"), () if tracked is None else tracked.manager.names)
    per_row, length_of = 1, ""
    if data is not None:
        from nbpeft.training.loop.packing import longest_sequence

        settings["max_length"], per_row, length_of = longest_sequence(
            source,
            data,
            tokenizer=tokenizer,
            max_length=settings.get("max_length"),
            columns=columns,
            packing=settings.get("packing", False),
        )
    if trainer_class is not None:
        from nbpeft.training.transformers.trainer import step_settings

        settings = step_settings(trainer_class) | settings
    if bits is not None:
        from nbpeft.memory.fake_quantized import quantization_of

        settings["quantization"] = quantization_of(bits, quant_type)
    chosen, count = largest_of(changes)
    settings = {"num_adapters": count, **settings} if count > 1 else settings
    planned = _planned(tracked, config, chosen)
    settings |= {"sequences_per_row": per_row, "length_of": length_of}
    return MemoryPlanner(source, planned, name=variable or name, **settings)


def _check_reference(reference: Any, adapters: Iterable[str]) -> None:
    """Refuse the name of a reference that no training of the model could have."""
    from nbpeft.engine.config.config_checks import check_choice

    if isinstance(reference, str):
        check_choice("reference", reference, (BASE, START, *adapters))


def _planned(tracked: TrackedModel | None, config: ConfigLike | None, changes: Mapping[str, Any]) -> AdapterConfig:
    """Return the config of the adapter to plan for; see ``plan``."""
    if config is None and tracked is not None and tracked.manager.names:
        manager = tracked.manager
        name = (manager.active or manager.names)[0]
        adapter, fields = manager.configs[name], tracked.requested_fields(name)
    else:
        adapter = build_config(USUAL_FIELDS if config is None else config)
        fields = meaning(adapter)
    if changes:
        method = changes.get("peft_type") or adapter.peft_type
        method = str(getattr(method, "value", method)).upper()
        if method != adapter.peft_type:
            fields = USUAL_FIELDS if method == DEFAULT_METHOD else {"task_type": USUAL_FIELDS["task_type"]}
        adapter = build_config({**fields, **changes})
    return adapter


class MemoryPlanner:
    """Forecasts for one model and many settings; has the model's shapes, but no weights.

    Args:
        source: a model, a config, a folder or a hub id.
        adapter: config of the trained adapter.
        name: display name of the model.
        batch_size: see ``Session.plan``, also for the further arguments.
        quantization: format of the linear layers; None for that of the model.
        **others: further fields of ``nbpeft.memory.estimate.Setting``.
        sequences_per_row: number of sequences of each row of the data.
        length_of: which sequence of the data has the length, as text; empty without data.
    """

    def __init__(
        self,
        source: Any,
        adapter: AdapterConfig,
        *,
        name: str,
        batch_size: int | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        gradient_checkpointing: bool | None = None,
        double_quant: bool | None = None,
        device: Any = None,
        sequences_per_row: int = 1,
        length_of: str = "",
        **others: Any,
    ) -> None:
        from nbpeft.memory.forecast import default_checkpointing, default_length, setting_of, stored_as

        if sequences_per_row > 1:
            batch_size = sequences_per_row * (BATCH_SIZE if batch_size is None else batch_size)
        self._pairs_note = _PAIRS_NOTE if sequences_per_row > 1 else ""
        self._source = source
        self.room = _room(device, source)
        found = _Detected(source, adapter)
        stored = stored_as(source, found.architecture.config)
        given_format, quantization = quantization is not None, quantization or stored.quantization
        if gradient_checkpointing is None:
            gradient_checkpointing = default_checkpointing(source, found.architecture, quantization, stored)
        length = max_length or default_length(found.architecture.config)
        assumed = [f"batch {BATCH_SIZE}"] if batch_size is None else []
        assumed += [f"length {length}"] if max_length is None else []
        verb = "is" if len(assumed) == 1 else "are"
        words = f"{' and '.join(assumed)} {verb} assumed, as in training" if assumed else ""
        given = f"length {length:,} is {length_of}" if length_of else ""
        self._settings_notes = tuple(note for note in (words, given) if note)
        self.setting: Setting = setting_of(
            found.architecture,
            adapter,
            batch_size=BATCH_SIZE if batch_size is None else batch_size,
            max_length=length if max_length is None else max_length,
            dtype=dtype or found.dtype,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
            double_quant=stored.double_quant if double_quant is None else double_quant,
            on_cpu=self.room.on_cpu,
            bfloat16=self.room.bfloat16,
            quantized_experts=stored.experts or given_format,
            **{"optim": "adamw", "training": True, **others},
        )
        self._stored_note = stored.note
        self.name = name
        self.class_name = found.class_name

    @property
    def settings(self) -> PlanSettings:
        """The settings of the planner."""
        return self._settings(self.setting)

    def plan(
        self, settings: PlanSettings | None = None, *, suggest: bool = True, stopped: Callable[[], bool] = lambda: False
    ) -> PlanResult:
        """Estimates the memory of a step; takes about a second the first time, and longer if it does not fit.

        Can be called from another thread.

        Args:
            settings: changes of the planner's settings; None for none.
            suggest: whether to look for changes that lower the peak, if it does not fit.
            stopped: returns True to end the search for suggestions early.
        """
        from nbpeft.memory.estimate import estimate
        from nbpeft.memory.suggest import suggest as suggestions_for

        device = "" if settings is None else settings.device
        room = _room(None if device == THIS_MACHINE else device, self._source) if device else self.room
        setting = dataclasses.replace(self._setting(settings), on_cpu=room.on_cpu, bfloat16=room.bfloat16)
        parts = estimate(setting)
        result = self._result(setting, parts, room)
        if suggest and not (result.fits and result.fits_now is not False):
            result = dataclasses.replace(result, changes=suggestions_for(setting, room.total, stopped))
        return dataclasses.replace(result, notes=(*self._settings_notes, *result.notes)) if settings is None else result

    def _setting(self, settings: PlanSettings | None) -> Setting:
        if settings is None:
            return self.setting
        import torch

        adapter = self.setting.adapter_config
        if adapter is not None and settings.rank is not None and adapter.adapter_size is not None:
            adapter = adapter.resized(settings.rank)
        chosen: dict[str, Any] = {name: getattr(settings, name) for name in _CHOSEN}
        dtype = getattr(torch, settings.dtype)
        return dataclasses.replace(self.setting, adapter_config=adapter, dtype=dtype, **chosen)

    def _settings(self, setting: Setting) -> PlanSettings:
        same: dict[str, Any] = {name: getattr(setting, name) for name in (*_CHOSEN, *_FIXED)}
        rank = None if setting.adapter_config is None else setting.adapter_config.adapter_size
        return PlanSettings(rank=rank, dtype=str(setting.dtype).removeprefix("torch."), **same)

    def _result(self, setting: Setting, parts: tuple[MemoryPart, ...], room: Room) -> PlanResult:
        import torch

        from nbpeft.memory.estimate import weights_of
        from nbpeft.memory.processor import slow_dtype_message, slow_here

        settings, config = self._settings(setting), setting.adapter_config
        adapter = "" if config is None else _adapter_title(config)
        whole = _WHOLE_NOTE if setting.training and not setting.loss_chunk_size else ""
        experts = _experts_note(weights_of(setting))
        found = (self._pairs_note, self._stored_note, experts, whole, _CUDA_NOTE if _is_graphics(room) else "")
        notes = tuple(note for note in found if note)
        if room.on_cpu and slow_here(setting.dtype):
            notes = (*notes, slow_dtype_message(setting.dtype))
        if not room.bfloat16 and setting.dtype == torch.bfloat16:
            notes = (*notes, _NO_BFLOAT16_NOTE.format(room.name))
        return PlanResult(self.name, self.class_name, adapter, settings, parts, room, notes=notes)


def _experts_note(weights: Weights) -> str:
    """Return a note about the experts' share of the trained parameters; empty if they have none."""
    trained, total = weights.of_experts, weights.trained_count
    if not trained:
        return ""
    return f"adapters on experts are {share(trained, total)} of the trainable parameters ({trained:,} of {total:,})"


def _adapter_title(adapter: AdapterConfig) -> str:
    """Return the method and its size as text: ``LoRA r=16``. The rest of a summary needs the model."""
    size_words = [f"{key}={value}" for key, value in summary_of(adapter).items() if value == str(adapter.adapter_size)]
    return " ".join((label_of(adapter), *size_words[:1]))


class _Detected:
    """Properties that a model or a config has itself."""

    def __init__(self, source: Any, adapter: AdapterConfig) -> None:
        from nbpeft.memory.architecture import architecture_of

        self.architecture = architecture_of(source, adapter)
        config = self.architecture.config
        self.dtype = _dtype_of(source) if hasattr(source, "parameters") else None
        kind = self.architecture.model_class
        self.class_name = kind.__name__ if kind is not None else next(iter(config.architectures or ()), "")


def _dtype_of(model: Any) -> str | None:
    """Return the dtype of most weights that are not quantized."""
    from nbpeft.memory import weights_by_kind

    labels = (kind.split(" ")[0] for kind in weights_by_kind(model))
    return next((SHORT_DTYPES[label] for label in labels if label in SHORT_DTYPES), None)


def _room(device: Any, source: Any) -> Room:
    """Return the device to fit: by default that of the model, or this machine's best one."""
    import torch

    from nbpeft.memory.devices import device_memory, has_bfloat16, is_cpu, placed_on
    from nbpeft.memory.forecast import device_bytes

    placed = placed_on(source)
    name = named(device) if isinstance(device, str) else None
    if name is not None:
        return Room(name, DEVICES[name], bfloat16=has_bfloat16(name))
    if device is None or device == THIS_MACHINE:
        device = placed if placed is not None and placed.type != "meta" else _best_device()
    try:
        there = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        there = None
    if there is None or there.type == "meta":
        total = device_bytes(device)
        return Room(size(total), total)
    device_bytes(there)
    memory = device_memory(there)
    held = sum(parameter.nbytes for parameter in _parameters(source)) if _is_on(placed, there) else 0
    on_cpu = is_cpu(there)
    name = "this machine (CPU)" if on_cpu else f"{there} of this machine"
    return Room(name, memory.total, memory.free, held, on_cpu, has_bfloat16(there))


def _is_graphics(room: Room) -> bool:
    """Return whether a CUDA context, or that of another GPU, needs memory on the device too."""
    return room.name.startswith("cuda") or (room.free is None and not is_apple(room.name))


def _is_on(placed: torch.device | None, there: torch.device) -> bool:
    """Return whether a parameter's device is the given one, which may lack an index."""
    import torch

    if placed is None or placed.type != there.type:
        return False
    return there.type == "cpu" or placed.index == (
        torch.accelerator.current_device_index() if there.index is None else there.index
    )


def _parameters(source: Any) -> Iterator[Any]:
    return iter(source.parameters()) if hasattr(source, "parameters") else iter(())


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def plan_or_reason(source: Any, config: AdapterConfig, name: str, settings: Mapping[str, Any]) -> PlanResult | str:
    """Return a forecast for a model and an adapter, without suggestions; if impossible, return the reason.

    Args:
        source: a model, a config, a folder or a hub id.
        config: config of the adapter.
        name: display name of the model.
        settings: further arguments of ``MemoryPlanner``.
    """
    try:
        return MemoryPlanner(source, config, name=name, **settings).plan(suggest=False)
    except NbpeftError as error:
        return str(error)
