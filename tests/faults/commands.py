"""Every command on a small model, and all of the state that it may change."""

from __future__ import annotations

import copy
import gc
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft import LoraConfig, PeftModel, PolyConfig, XLoraConfig, get_peft_model, hotswap_adapter, sweep
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.model import AdapterPool, set_peft_model_state_dict
from nbpeft.model.handle.state_dicts import get_base_model_state_dict, set_base_model_state_dict
from nbpeft.session import Session
from nbpeft.session.history import PastAdapter
from nbpeft.training.request import TrainRequest
from nbpeft.training.sweep.adapters import _members as sweep_members

WIDTH, WORDS = 64, 7
IDS = torch.tensor([[0, 3, 6], [5, 2, 1]])
STORAGES = ("dense", "nf4", "int8")


class Tiny(nn.Module):
    """An embedding, two layers that are quantized, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor, output_hidden_states: bool = False) -> Any:
        hidden = self.embed(ids)
        hidden = hidden + torch.tanh(self.first(hidden))
        hidden = hidden + torch.tanh(self.second(hidden))
        return SimpleNamespace(hidden_states=(hidden,)) if output_hidden_states else self.head(hidden)


def tiny(storage: str) -> nn.Module:
    """The bare model, always with the same values."""
    torch.default_generator.manual_seed(0)
    model = Tiny()
    if storage != "dense":
        import bitsandbytes as bnb

        for name in ("first", "second"):
            plain: Any = getattr(model, name)
            bias = plain.bias is not None
            made: Any = (
                bnb.nn.Linear4bit(WIDTH, WIDTH, bias, compute_dtype=torch.float32, quant_type="nf4")
                if storage == "nf4"
                else bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias, has_fp16_weights=False)
            )
            made.load_state_dict(plain.state_dict())
            setattr(model, name, made.to("cpu"))
    return model.eval()


def config(r: int = 2, **fields: Any) -> LoraConfig:
    """One whose adapters are no identity."""
    settings: dict[str, Any] = {"target_modules": ["first", "second"], "init_lora_weights": False, **fields}
    return LoraConfig(r=r, **settings)


@dataclass
class Stage:
    """A model that a command is run on.

    Attributes:
        base: the bare model.
        model: the handle on it, if it is adapted.
        pool: the pool on it, if there is one.
        past: adapters that a session deleted or replaced before, the last one last.
        session: what runs a command of a session, once it has begun.
        call: what each call of the model needs beside its ids.
    """

    base: nn.Module
    model: Any = None
    pool: Any = None
    returned: Any = None
    past: tuple[PastAdapter, ...] = ()
    session: Any = None
    call: Mapping[str, Any] = field(default_factory=dict)


def adapted(storage: str) -> Stage:
    """A model with adapters of several kinds: ``a`` is active and trains."""
    torch.default_generator.manual_seed(1)
    base = tiny(storage)
    model = get_peft_model(base, config(), adapter_name="a")
    model.add_adapter("b", config(4, lora_alpha=3, use_rslora=True))
    model.add_adapter("dora", config(2, use_dora=True))
    model.add_adapter("whole", config(2, target_modules=["first"], modules_to_save=["head"], bias="lora_only"))
    model.add_adapter("rows", config(2, target_modules=["second"], trainable_token_indices={"embed": [1, 4]}))
    with torch.no_grad():  # a copy with the base's values would not show which of the two was written
        model.base_model.model.head.modules_to_save["whole"].weight.add_(0.5)
    return Stage(base, model.eval())


def mixed(storage: str) -> Stage:
    """A model with mixtures of adapters: ``a`` and ``b`` weigh them for each token, ``b`` trains them too."""
    torch.default_generator.manual_seed(1)
    base = tiny(storage)
    model = get_peft_model(base, mixture(), adapter_name="a")
    model.add_adapter("b", mixture(softmax_temperature=0.5, use_trainable_adapters=True))
    model.add_adapter("dora", config(2, use_dora=True))
    return Stage(base, model.eval())


def tasked(storage: str) -> Stage:
    """A model with adapters that mix their skills by the task of each row."""
    torch.default_generator.manual_seed(1)
    base = tiny(storage)
    model = get_peft_model(base, poly(), adapter_name="a")
    model.add_adapter("b", poly(n_skills=2))
    model.add_adapter("dora", config(2, use_dora=True))
    return Stage(base, model.eval(), call={"task_ids": torch.tensor([0, 2])})


def mixture(**fields: Any) -> XLoraConfig:
    """A mixture of two saved adapters."""
    experts = {"0": saved()["b"], "1": saved()["c"]}
    return XLoraConfig(task_type="CAUSAL_LM", hidden_size=WIDTH, adapters=experts, **fields)


def poly(**fields: Any) -> PolyConfig:
    """Three tasks on skills that are no identity."""
    settings: dict[str, Any] = {"target_modules": ["first", "second"], "n_skills": 4, "n_splits": 2, "n_tasks": 3}
    return PolyConfig(**{"r": 4, "init_weights": False, **settings, **fields})


def merged(storage: str) -> Stage:
    """The same with ``a`` merged."""
    stage = adapted(storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stage.model.merge_adapter()
    return stage


def undoable(take: Callable[[Session], object], first: Callable[[str], Stage] = adapted) -> Callable[[str], Stage]:
    """The same, or another stage, after a command of a session that can be undone."""

    def made(storage: str) -> Stage:
        stage = first(storage)
        stage.model.manager.unsaved.add("a")
        session = session_of(stage)
        take(session)
        stage.past, stage.session = session.context.history.of(stage.model.manager), None
        return stage

    return made


def session_of(stage: Stage) -> Session:
    """A session that knows the model and what became of its adapters before."""
    session = Session()
    session.register(stage.model, name="model")
    manager = stage.model.manager
    with manager.transaction(quiet=True) as change:
        for past in stage.past:
            session.context.history.add(manager, past, change)
    stage.session = session
    return session


def pooled(storage: str) -> Stage:
    """A model with two adapters in a pool that has room for one."""
    torch.default_generator.manual_seed(1)
    base = tiny(storage)
    folders = saved()
    one = (Path(folders["b"]) / "adapter_model.safetensors").stat().st_size / 1e6
    pool = AdapterPool(base, limit_mb=1.4 * one, adapters={name: folders[name] for name in ("b", "b2", "c")})
    pool.set_adapter("b")
    return Stage(base, pool.model, pool)


_SAVED: dict[str, str] = {}


def saved() -> dict[str, str]:
    """Folders of adapters, written once."""
    if not _SAVED:
        folder = Path(tempfile.mkdtemp(prefix="nbpeft-test-"))
        torch.default_generator.manual_seed(2)
        settings = {"b": config(4), "b2": config(4, lora_alpha=5), "c": config(2, lora_alpha=1), "wide": config(6)}
        settings["full"] = config(2, target_modules=["first"], modules_to_save=["head"], bias="lora_only")
        settings["headless"] = config(2, target_modules=["first"], bias="lora_only")
        for name, one in settings.items():
            get_peft_model(tiny("dense"), one, adapter_name="default").save_pretrained(str(folder / name))
            _SAVED[name] = str(folder / name)
        for name, other in {"mixture": mixture(softmax_temperature=0.25), "poly": poly(n_skills=2)}.items():
            get_peft_model(tiny("dense"), other, adapter_name="default").save_pretrained(str(folder / name))
            _SAVED[name] = str(folder / name)
    return _SAVED


@dataclass(frozen=True)
class Command:
    """A command and the stage it is run on.

    Attributes:
        stage: makes the stage.
        run: the command.
        unloads: whether no adapters are left.
        writes_base: whether the base model has other values after unloading.
    """

    stage: Callable[[str], Stage]
    run: Callable[[Stage], object]
    unloads: bool = False
    writes_base: bool = False


def _get_peft_model(stage: Stage) -> None:
    stage.model = get_peft_model(stage.base, config(), adapter_name="a")


def _from_pretrained(stage: Stage) -> None:
    stage.model = PeftModel.from_pretrained(stage.base, saved()["full"], adapter_name="a", is_trainable=True)


def _blocks(stage: Stage) -> None:
    with stage.model.use(["b", "a"]), stage.model.disable_adapter(), stage.model.use("dora"):
        stage.model(IDS)


def _disable(stage: Stage) -> None:
    with stage.model.disable_adapter():
        stage.model(IDS)


def _train(stage: Stage) -> None:
    stage.model(IDS).sum().backward()
    stage.model.zero_grad()


def _mixed(stage: Stage) -> None:
    stage.model(IDS, adapter_names=["b", "__base__"])


def _state_dict(stage: Stage) -> None:
    values = {name: tensor + 1 for name, tensor in get_base_model_state_dict(stage.model).items() if "head" in name}
    set_base_model_state_dict(stage.model, values, strict=False)


def _adapter_state(stage: Stage) -> None:
    from safetensors.torch import load_file

    tensors = load_file(Path(saved()["b"]) / "adapter_model.safetensors")
    set_peft_model_state_dict(stage.model, tensors, "b")


def _sweep(stage: Stage) -> None:
    """Makes the adapters of a sweep, of which nothing is learned."""
    with sweep_members(TrainRequest(stage.model, None, arguments={"learning_rate": sweep(0.1, 0.2)})):
        stage.model(IDS)


def called(stage: Stage) -> Any:
    """What a call of the model returns; only a handle with adapters that mix skills takes task ids."""
    configs = stage.model.peft_config.values() if stage.call and stage.model is not None else ()
    if any(isinstance(one, PolyConfig) for one in configs):
        return stage.model(IDS, **stage.call)
    return stage.base(IDS)


def _combine(kind: str) -> Callable[[Stage], object]:
    return lambda stage: stage.model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.7], "sum", kind, svd_rank=3)


COMMANDS: dict[str, Command] = {
    "get_peft_model": Command(lambda storage: Stage(tiny(storage)), _get_peft_model),
    "from_pretrained": Command(lambda storage: Stage(tiny(storage)), _from_pretrained),
    "add": Command(adapted, lambda s: s.model.add_adapter("new", config(3))),
    "add dora": Command(adapted, lambda s: s.model.add_adapter("new", config(3, use_dora=True))),
    "add copies": Command(adapted, lambda s: s.model.add_adapter("new", config(3, modules_to_save=["head"]))),
    "add rows": Command(
        adapted, lambda s: s.model.add_adapter("new", config(3, trainable_token_indices={"embed": [2]}))
    ),
    "add beside merged": Command(merged, lambda s: s.model.add_adapter("new", config(3))),
    "replace": Command(adapted, lambda s: s.model.manager.add("a", config(5), replace=True)),
    "replace copies": Command(adapted, lambda s: s.model.manager.add("whole", config(5), replace=True)),
    "load": Command(adapted, lambda s: s.model.load_adapter(saved()["b"], "loaded")),
    "load over": Command(adapted, lambda s: s.model.load_adapter(saved()["c"], "b")),
    "delete": Command(adapted, lambda s: s.model.delete_adapter("b")),
    "delete active": Command(adapted, lambda s: s.model.delete_adapter("a")),
    "delete copies": Command(adapted, lambda s: s.model.delete_adapter("whole")),
    "delete rows": Command(adapted, lambda s: s.model.delete_adapter("rows")),
    "delete beside merged": Command(merged, lambda s: s.model.delete_adapter("b")),
    "rename": Command(adapted, lambda s: s.model.manager.rename("a", "z")),
    "rename copies": Command(adapted, lambda s: s.model.manager.rename("whole", "z")),
    "copy": Command(adapted, lambda s: s.model.manager.copy("b", "twin")),
    "switch": Command(adapted, lambda s: s.model.set_adapter("b")),
    "switch several": Command(adapted, lambda s: s.model.set_adapter(["rows", "dora"], inference_mode=True)),
    "switch merged": Command(merged, lambda s: s.model.set_adapter("b")),
    "off": Command(adapted, lambda s: s.model.manager.disable()),
    "off merged": Command(merged, lambda s: s.model.manager.disable()),
    "scale": Command(adapted, lambda s: s.model.manager.set_scale("a", 0.5)),
    "freeze": Command(adapted, lambda s: s.model.manager.freeze("a")),
    "requires_grad": Command(adapted, lambda s: s.model.set_requires_grad("a", False)),
    "merge": Command(adapted, lambda s: s.model.merge_adapter(["a", "dora"])),
    "merge copies": Command(adapted, lambda s: s.model.merge_adapter(["whole"])),
    "merge rows": Command(adapted, lambda s: s.model.merge_adapter(["rows"], safe_merge=True)),
    "merge beside merged": Command(merged, lambda s: s.model.merge_adapter(["dora"])),
    "keep merged": Command(merged, lambda s: s.base.first.merged_adapters.clear(), writes_base=True),
    "assign configs": Command(
        adapted, lambda s: setattr(s.model, "peft_config", copy.deepcopy(dict(s.model.peft_config)))
    ),
    "unmerge": Command(merged, lambda s: s.model.unmerge_adapter()),
    "combine": Command(adapted, _combine("svd")),
    "combine cat": Command(adapted, _combine("cat")),
    "combine rows": Command(
        adapted, lambda s: s.model.base_model.add_weighted_adapter(["b", "rows"], [0.5, 0.7], "sum", "exact")
    ),
    "swap": Command(adapted, lambda s: hotswap_adapter(s.model, saved()["b2"], "b")),
    "swap smaller": Command(adapted, lambda s: hotswap_adapter(s.model, saved()["c"], "b")),
    "swap larger": Command(adapted, lambda s: hotswap_adapter(s.model, saved()["wide"], "b")),
    "swap copies": Command(adapted, lambda s: hotswap_adapter(s.model, saved()["full"], "whole")),
    "swap without copies": Command(adapted, lambda s: hotswap_adapter(s.model, saved()["headless"], "whole")),
    "state dict": Command(adapted, _state_dict, writes_base=True),
    "adapter state dict": Command(adapted, _adapter_state),
    "unload": Command(adapted, lambda s: s.model.unload(), unloads=True),
    "unload merged": Command(merged, lambda s: s.model.unload(), unloads=True),
    "merge_and_unload": Command(adapted, lambda s: s.model.merge_and_unload(adapter_names=["a", "dora"]), unloads=True),
    "merge_and_unload merged": Command(
        merged, lambda s: s.model.merge_and_unload(adapter_names=["a", "b"]), unloads=True
    ),
    "session delete": Command(adapted, lambda s: session_of(s).delete("a")),
    "session delete several": Command(adapted, lambda s: session_of(s).delete(["a", "rows", "b"])),
    "session reset": Command(adapted, lambda s: session_of(s).reset("a")),
    "session reset copies": Command(adapted, lambda s: session_of(s).reset("whole")),
    "session reconfigure": Command(adapted, lambda s: session_of(s).add("model", config(5), name="a")),
    "session keep weights": Command(adapted, lambda s: session_of(s).add("model", config(2, lora_alpha=9), name="a")),
    "session load": Command(adapted, lambda s: session_of(s).load(saved()["b"], name="a", replace=True)),
    "session swap": Command(adapted, lambda s: session_of(s).swap(saved()["b2"], into="b", replace=True)),
    "session combine": Command(adapted, lambda s: session_of(s).combine({"b": 1.0}, name="a", replace=True)),
    "undo delete": Command(undoable(lambda session: session.delete("a")), lambda s: session_of(s).undo()),
    "undo delete copies": Command(undoable(lambda session: session.delete("whole")), lambda s: session_of(s).undo()),
    "undo reconfigure": Command(
        undoable(lambda session: session.add("model", config(5), name="a")), lambda s: session_of(s).undo()
    ),
    "undo swap": Command(
        undoable(lambda session: session.swap(saved()["b2"], into="b")), lambda s: session_of(s).undo()
    ),
    "blocks": Command(adapted, _blocks),
    "block merged": Command(merged, _disable),
    "sweep": Command(adapted, _sweep),
    "forward": Command(adapted, _train),
    "mixed batch": Command(adapted, _mixed),
    "pool": Command(pooled, lambda s: s.pool.set_adapter("b2")),
    "pool other": Command(pooled, lambda s: s.pool.set_adapter("c")),
    "pool call": Command(pooled, lambda s: s.model(IDS, adapter_names=["b", "__base__"])),
    "pool unregister": Command(pooled, lambda s: s.pool.unregister("c")),
}


def _of_method(
    kind: str, stage: Callable[[str], Stage], new: Callable[..., AdapterConfig]
) -> Iterator[tuple[str, Command]]:
    """The commands on adapters of a method that needs more than its own layer."""
    steps: dict[str, Callable[[Stage], object]] = {
        "add": lambda s: s.model.add_adapter("new", new()),
        "replace": lambda s: s.model.manager.add("a", new(), replace=True),
        "load": lambda s: s.model.load_adapter(saved()[kind], "loaded"),
        "load over": lambda s: s.model.load_adapter(saved()[kind], "b"),
        "delete": lambda s: s.model.delete_adapter("b"),
        "delete active": lambda s: s.model.delete_adapter("a"),
        "rename": lambda s: s.model.manager.rename("a", "z"),
        "copy": lambda s: s.model.manager.copy("b", "twin"),
        "switch": lambda s: s.model.set_adapter("b"),
        "switch away": lambda s: s.model.set_adapter("dora"),
        "off": lambda s: s.model.manager.disable(),
        "scale": lambda s: s.model.manager.set_scale("a", 0.5),
        "freeze": lambda s: s.model.manager.freeze("a"),
        "call": called,
        "session reset": lambda s: session_of(s).reset("a"),
        "session delete": lambda s: session_of(s).delete("a"),
        "session reconfigure": lambda s: session_of(s).add("model", new(), name="a"),
    }
    yield from ((f"{kind} {name}", Command(stage, run)) for name, run in steps.items())
    yield f"{kind} unload", Command(stage, lambda s: s.model.unload(), unloads=True)
    yield (
        f"{kind} undo delete",
        Command(undoable(lambda session: session.delete("a"), stage), lambda s: session_of(s).undo()),
    )


COMMANDS |= _of_method("mixture", mixed, mixture)
COMMANDS |= _of_method("poly", tasked, poly)
COMMANDS |= {
    "poly swap": Command(tasked, lambda s: hotswap_adapter(s.model, saved()["poly"], "b")),
    "mixture start": Command(
        lambda storage: Stage(tiny(storage)),
        lambda s: setattr(s, "model", get_peft_model(s.base, mixture(), adapter_name="a")),
    ),
    "mixture from_pretrained": Command(
        lambda storage: Stage(tiny(storage)),
        lambda s: setattr(s, "model", PeftModel.from_pretrained(s.base, saved()["mixture"], adapter_name="a")),
    ),
    "mixture top": Command(mixed, lambda s: s.model.set_topk_lora(1)),
    "mixture weight": Command(mixed, lambda s: s.model.set_global_scaling_weight(0.5)),
    "mixture first pass": Command(mixed, lambda s: s.model.set_scaling_pass_value(0.25)),
}


@torch.no_grad()
def state_of(stage: Stage) -> dict[str, Any]:
    """Everything a command may change, in a form that can be compared."""
    base = stage.base
    state: dict[str, Any] = {"outputs": _bits(called(stage)), "gc": gc.isenabled()}
    state["signal"] = signal.getsignal(signal.SIGINT)
    for name, module in base.named_modules(remove_duplicate=False):
        state[f"module {name}"] = type(module)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state[f"hooks {name}"] = tuple(len(held) for held in hooks)
        state[f"training {name}"] = module.training
        if isinstance(module, AdaptedLayer):
            state[f"merged {name}"] = module.merged, module._frozen is None
            for key, adapter in module.adapters.items():
                state[f"scaling {name} {key}"] = float(getattr(adapter, "scaling", 0)), adapter.__dict__.get("padded")
        if isinstance(module, ModulesToSaveWrapper):
            state[f"copies {name}"] = tuple(module.modules_to_save)
        backend = module.backend if isinstance(module, AdaptedLayer) else None
        for place, tensor in enumerate(backend.tensors(module.base_layer) if backend is not None else ()):
            state[f"stored {name} {place}"] = _bits(tensor)
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    for name, tensor in tensors.items():
        state[f"tensor {name}"] = _bits(tensor), tensor.requires_grad
    manager = base.__dict__.get("_nbpeft_manager")
    state["managed"] = manager is not None and manager.alive
    if stage.pool is not None and manager is not None:  # what is resident is a cache, which may hold more
        state = {"outputs": state["outputs"], "grad": state["gc"], "signal": state["signal"]}
        state["who"] = (
            manager.active,
            manager.enabled,
            manager.merged,
            stage.pool.names,
            dict(stage.pool._device.refs),
        )
        state["open"] = manager.active_state.scopes, len(manager.active_state._calls), manager.active_state._writer
    elif manager is not None:
        state["who"] = (manager.names, manager.active, manager.enabled, manager.merged, sorted(manager.frozen))
        state["scales"] = [manager.scale(name) for name in manager.names]
        with manager.active_state.call():  # as a call of the model finds it
            state["acts"] = manager.active_state.current(), manager.active_state.live, manager.active_state.traced
        state["configs"] = {name: one.to_dict() for name, one in manager.configs.items()}
        state["paths"] = sorted(manager.layers), sorted(manager.copies)
        state["biases"] = {name: sorted(manager.base_biases(name)) for name in manager.names}
        state["open"] = manager.active_state.scopes, len(manager.active_state._calls), manager.active_state._writer
        state["handle"] = stage.model is None or manager.owner is stage.model._token
        state["unsaved"] = sorted(manager.unsaved)
        past = stage.past if stage.session is None else stage.session.context.history.of(manager)
        state["past"] = [(one.kept.name, one.did, one.kept.byte_count, one.successor is not None) for one in past]
    return state


def _bits(tensor: Tensor) -> bytes:
    plain = tensor.detach().as_subclass(Tensor).contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy().data) + str(tuple(plain.shape)).encode()


def twin(stage: Stage) -> Stage:
    """An independent copy of a stage."""
    return copy.deepcopy(stage)


def run_quietly(command: Command, stage: Stage, seed: int = 3) -> None:
    """Runs a command with the same random numbers each time; warnings are not the point here."""
    torch.default_generator.manual_seed(
        seed
    )  # of the CPU alone: the seeds of devices that are not there take longer than most commands
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command.run(stage)
