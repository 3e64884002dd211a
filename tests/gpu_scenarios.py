"""What each scenario of ``test_gpu.py`` does on a pretended GPU: python -m tests.gpu_scenarios FILE."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import Tensor, nn

from nbpeft import AdapterPool, LoraConfig, PeftModel, get_peft_model
from nbpeft.checkpoint import fingerprint
from nbpeft.memory import measure
from nbpeft.model.saving.merge_export import merge_to_folder
from nbpeft.model.swapping.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from nbpeft.training import start_run
from tests.closeness import assert_close
from tests.pretend_gpu import pretended, waits
from tests.tiny_models import llama

GPU = "gpu:0"
IDS = torch.arange(10).view(2, 5)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.5},
    "lora bias": {"lora_bias": True, "target_modules": ["first", "conv", "head"]},
    "pissa": {"init_lora_weights": "pissa_niter_2", "target_modules": ["first", "second"]},
    "copies": {"modules_to_save": ["head"], "target_modules": ["first"]},
    "rows": {"trainable_token_indices": {"embed": [1, 2]}, "target_modules": ["first"]},
}
MIXED = ("lora", "dropout", "dora", "lora bias", "copies")

scenarios: dict[str, Callable[[], None]] = {}


def scenario(work: Callable[..., None], name: str, *args: Any) -> None:
    scenarios[name] = lambda: work(*args)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16, bias=False)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.second(self.first(self.embed(ids)))
        return self.head(self.conv(hidden.transpose(1, 2)).transpose(1, 2))


def adapted(base: nn.Module, **config: Any) -> Any:
    torch.manual_seed(1)
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["embed", "first", "second", "conv", "head"]}
    return get_peft_model(base, LoraConfig(**(settings | config)))


def pair(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same adapted model on the GPU and on the CPU."""
    torch.manual_seed(0)
    base = Layers().to(dtype)
    twin = copy.deepcopy(base)
    return adapted(base.to(GPU), **config), adapted(twin, **config)


def close(ours: Tensor, theirs: Tensor) -> None:
    # Four layers and their gradients. Both use the CPU's kernels: only sums in float32 are added in another order.
    assert_close(ours.detach().cpu(), theirs.detach(), depth=12, dtype=torch.float32)


def step(model: Any, ids: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    model.train()
    output = model(ids)
    output.float().square().sum().backward()
    return [output, *(part.grad for part in model.parameters() if part.requires_grad)]


def as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """A step, inference, merging and files give what they give on the CPU, and no step waits."""
    ours, theirs = pair(CONFIGS[name], dtype)
    ids = IDS.to(GPU)
    waits.clear()
    found = step(ours, ids)
    assert not waits, waits
    for mine, other in zip(found, step(theirs, IDS), strict=True):
        assert mine.device.type == "gpu"
        close(mine, other)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        ours(ids)
        waits.clear()
        close(ours(ids), theirs(IDS))
        assert not waits, waits
        before = ours.get_base_model().first.base_layer.weight.clone()
        for model in (ours, theirs):
            model.merge_adapter(safe_merge=True)
        close(ours(ids), theirs(IDS))
        ours.unmerge_adapter()
        assert torch.equal(ours.get_base_model().first.base_layer.weight, before)
    assert measure(ours).device == GPU
    assert fingerprint(ours.get_base_model()).weights
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        ours.load_adapter(folder, "again")
    assert {part.device.type for part in (*ours.parameters(), *ours.buffers())} == {"gpu"}


def several(name: str) -> None:
    """Mixed batches, two active adapters, combinations."""
    ours, theirs = pair(CONFIGS[name])
    ids = IDS.to(GPU)
    for model in (ours.eval(), theirs.eval()):
        torch.manual_seed(5)
        settings = {"target_modules": ["embed", "first", "second", "conv", "head"]} | CONFIGS[name]
        model.add_adapter("b", LoraConfig(r=4, lora_alpha=3, init_lora_weights=False, **settings))
        model.eval()  # new adapters train
    with torch.no_grad():
        for names in (["default", "b"], ["b", "__base__"]):
            close(ours(ids, adapter_names=names), theirs(IDS, adapter_names=names))
        if "modules_to_save" in CONFIGS[name]:
            return
        for kind in ("exact", "svd"):
            for model in (ours, theirs):
                model.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], kind, combination_type=kind)
                model.set_adapter(kind)
            close(ours(ids), theirs(IDS))


def spread(name: str) -> None:
    """Layers on two devices, inputs moved by accelerate inside the call of a layer."""
    ours, theirs = pair(CONFIGS[name])
    base = ours.get_base_model()
    # Without adapters first: a model is spread when it is loaded.
    ours.unload()
    for path, device in (("embed", 0), ("first", 1), ("second", 0), ("conv", 1), ("head", 0)):
        layer = getattr(base, path).to(f"gpu:{device}")
        add_hook_to_module(layer, AlignDevicesHook(execution_device=torch.device("gpu", device)))
    ours = adapted(base, **CONFIGS[name])
    ids = IDS.to("gpu:1")
    with torch.no_grad():
        outputs = []
        for model, tokens in ((ours, ids), (theirs, IDS)):
            torch.manual_seed(3)
            outputs += [model.train()(tokens), model.eval()(tokens)]
            if name in MIXED:
                torch.manual_seed(5)
                settings = {"target_modules": ["embed", "first", "second", "conv", "head"]} | CONFIGS[name]
                model.add_adapter("b", LoraConfig(r=4, init_lora_weights=False, **settings))
                outputs.append(model(tokens, adapter_names=["default", "b"]))
    for mine, other in zip(outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :], strict=True):
        close(mine, other)


def adapted_llama(**config: Any) -> Any:
    torch.manual_seed(1)
    return adapted(llama().to(GPU), **{"target_modules": "all-linear"} | config)


def merged_into_files(**config: Any) -> None:
    """Adapters on the GPU, weights in full precision in a folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        llama().save_pretrained(folder / "base")
        merge_to_folder(adapted_llama(**config), None, folder / "ours", base=folder / "base")
        merge_to_folder(adapted_llama(**config), None, folder / "live")
        ours, live = (type(llama()).from_pretrained(folder / name) for name in ("ours", "live"))
    for mine, other in zip(ours.parameters(), live.parameters(), strict=True):
        assert_close(mine, other)


def exchanged() -> None:
    """A pool that fits two of four adapters, and a hot-swap that waits for nothing afterwards."""
    ids = IDS.to(GPU)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        wanted = {}
        for number in range(4):
            torch.manual_seed(number)
            config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
            one = get_peft_model(llama(), config, adapter_name=f"a{number}").eval()
            one.save_pretrained(place)
            wanted[f"a{number}"] = one(input_ids=IDS).logits
        model = adapted_llama().eval()
        size = sum(part.nbytes for part in model.manager.parameters("default"))
        sources = {name: f"{place}/{name}" for name in wanted}
        with AdapterPool(model, 2.5 * size / 1e6, adapters=sources) as pool:
            for name in (*wanted, *wanted):
                pool.set_adapter(name)
                close(model(input_ids=ids).logits, wanted[name])
            assert pool.statistics.swaps
        slot = adapted_llama().eval()
        prepare_model_for_compiled_hotswap(slot, target_rank=8)
        hotswap_adapter(slot, sources["a1"], "default")
        waits.clear()
        close(slot(input_ids=ids).logits, wanted["a1"])
        assert not waits, waits
        loaded = PeftModel.from_pretrained(llama().to(GPU), sources["a2"])
        assert {part.device.type for part in loaded.parameters()} == {"gpu"}


def moved_while_watched() -> None:
    """A run begins before the Trainer brings the model to the GPU, where weights are looked at again."""
    for rate, message in ((0.1, ""), (0.0, "No weight of adapter 'default' has changed in 3 steps")):
        model = adapted_llama()
        with start_run(model, total_steps=3) as run:
            # Parameters of this device cannot be moved as CUDA's are; what was noted of them can.
            check: Any = run._check
            check._before = {name: sample.cpu() for name, sample in check._before.items()}
            optimizer = torch.optim.SGD(model.manager.parameters("default"), lr=rate)
            ids = IDS.to(GPU)
            for _ in range(3):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss)
        assert run.state.message[: len(message) or None] == message


def fused() -> None:
    """The default optimizer of Trainer leaves no trace in a tensor's version; norms follow nevertheless."""
    ids = IDS.to(GPU)
    for training in (True, False):
        model = adapted_llama(use_dora=True).eval()
        with torch.no_grad():
            model(input_ids=ids)
        optimizer = torch.optim.AdamW(model.manager.parameters("default"), lr=0.1, fused=True)
        model.train(training)(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            found = model.eval()(input_ids=ids).logits
            twin = llama().to(GPU)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                close(found, PeftModel.from_pretrained(twin, folder).eval()(input_ids=ids).logits.cpu())


def prepared() -> None:
    """DoRA with its scaling as a tensor waits for nothing either."""
    ids = IDS.to(GPU)
    model = adapted_llama(use_dora=True).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    with torch.no_grad():
        model(input_ids=ids)
        waits.clear()
        model(input_ids=ids)
    assert not waits, waits


scenario(fused, "DoRA after a step of a fused optimizer")
scenario(prepared, "DoRA prepared for hot-swapping")
scenario(moved_while_watched, "a model that is moved after its run has begun")
for _name in CONFIGS:
    for _dtype in (torch.float32, torch.bfloat16):
        scenario(as_on_the_cpu, f"{_name}, {str(_dtype).removeprefix('torch.')}, as on the CPU", _name, _dtype)
    scenario(spread, f"{_name}, on two devices", _name)
for _name in MIXED:
    scenario(several, f"{_name}, several adapters", _name)
scenario(merged_into_files, "merged into the weights of a folder")
scenarios["rows merged into the weights of a folder"] = lambda: merged_into_files(trainable_token_indices=[1, 2])
scenario(exchanged, "pool and hot-swap")


def main() -> None:
    failures = {}
    torch.set_num_threads(1)
    for name, work in scenarios.items():
        warnings.simplefilter("ignore")
        try:
            with pretended():
                work()
        except Exception:
            failures[name] = traceback.format_exc(limit=-8)[-4000:]
    Path(sys.argv[1]).write_text(json.dumps(failures))
    os._exit(0)  # torch's threads of the device would abort the process


if __name__ == "__main__":
    main()
