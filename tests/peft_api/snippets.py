"""What PEFT's documentation shows, page by page, on tiny models: written for ``peft``, checked as they run.

Each begins with these names: ``base`` (a causal language model), ``tokens`` (its input), ``model_id`` (a folder with
that model), ``adapter_0`` and ``adapter_1`` (folders of LoRA adapters on it, ranks 4 and 8), ``folder`` (an empty one).

    python snippets.py LIBRARY FOLDER       runs them with peft, nbpeft or as-peft; prints what went wrong as JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

SNIPPETS: dict[str, str] = {}

SNIPPETS["quicktour"] = """
from transformers import AutoModelForCausalLM
from peft import LoraConfig, TaskType, get_peft_model, AutoPeftModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(model_id)
peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
model = get_peft_model(base, peft_config)
model.print_trainable_parameters()
model.save_pretrained(folder)
loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
assert loaded.peft_config["default"].r == 8
loaded.eval()
assert loaded.generate(input_ids=tokens, max_new_tokens=3, do_sample=False).shape[1] == tokens.shape[1] + 3
"""

SNIPPETS["config"] = """
from peft import PeftConfig, PeftModel
config = PeftConfig.from_pretrained(adapter_0)
assert config.peft_type == "LORA" and config.base_model_name_or_path == model_id
model = PeftModel.from_pretrained(base, adapter_0)
assert not any(parameter.requires_grad for parameter in model.parameters())
"""

# developer_guides/lora

for _init in ("gaussian", False, "pissa", "pissa_niter_4", "olora", "orthogonal"):
    SNIPPETS[f"lora: init {_init}"] = f"""
from peft import LoraConfig, get_peft_model
before = base(tokens).logits
config = LoraConfig(init_lora_weights={_init!r}, r=4, target_modules=["q_proj"])
after = get_peft_model(base, config)(tokens).logits
assert torch.allclose(before, after, atol=1e-4) == ({_init!r} is not False)
"""

SNIPPETS["lora: rank-stabilized"] = """
from peft import LoraConfig, get_peft_model
model = get_peft_model(base, LoraConfig(use_rslora=True, r=4, lora_alpha=8, target_modules=["q_proj"]))
assert base.model.layers[0].self_attn.q_proj.scaling["default"] == 4
"""

SNIPPETS["lora: DoRA"] = """
from peft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
offload = torch.cuda.is_available()
config = LoraConfig(use_dora=True, runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=offload), r=4)
model = get_peft_model(base, config)
model.eval()
with DoraCaching():
    output = model(tokens).logits
assert torch.allclose(output, model(tokens).logits, atol=1e-6)
model.save_pretrained(folder)
again = PeftModel.from_pretrained(fresh(), folder, ephemeral_gpu_offload=offload)
assert torch.allclose(again(tokens).logits, output, atol=1e-5)
"""

SNIPPETS["lora: QLoRA style"] = """
from peft import LoraConfig, get_peft_model
model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
assert "lm_head" not in model.targeted_module_names and len(model.targeted_module_names) == 7 * len(base.model.layers)
"""

SNIPPETS["lora: finegrained ranks"] = """
from peft import LoraConfig, get_peft_model
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 16})
model = get_peft_model(base, config)
attention = base.model.layers[0].self_attn
assert attention.q_proj.r["default"] == 4 and attention.v_proj.r["default"] == 2
assert attention.v_proj.scaling["default"] == 8
"""

SNIPPETS["lora: some layers"] = """
from peft import LoraConfig, get_peft_model
config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
assert get_peft_model(base, config).targeted_module_names == ["model.layers.1.self_attn.q_proj"]
"""

SNIPPETS["lora: excluded modules"] = """
from peft import LoraConfig, get_peft_model
config = LoraConfig(target_modules="all-linear", exclude_modules=r".*mlp.*")
assert not any("mlp" in name for name in get_peft_model(base, config).targeted_module_names)
"""

SNIPPETS["lora: trainable tokens"] = """
from peft import LoraConfig, get_peft_model
config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
model = get_peft_model(base, config)
model(input_ids=tokens, labels=tokens).loss.backward()
model.save_pretrained(folder)
"""

SNIPPETS["lora: modules to save"] = """
from peft import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
with torch.no_grad():
    base.lm_head.weight.add_(1)
model.save_pretrained(folder)
again = PeftModel.from_pretrained(fresh(), folder)
assert torch.allclose(again(tokens).logits, model.eval()(tokens).logits, atol=1e-5)
"""

SNIPPETS["lora: LoRA-FA"] = """
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
optimizer = create_lorafa_optimizer(model=model, r=4, lora_alpha=8, lr=7e-3)
layer = base.model.layers[0].self_attn.q_proj
before = layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
assert torch.equal(layer.lora_A["default"].weight, before[0])
assert not torch.equal(layer.lora_B["default"].weight, before[1])
"""

SNIPPETS["lora: LoRA+"] = """
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
optimizer = create_loraplus_optimizer(
    model=model, optimizer_cls=torch.optim.AdamW, lr=5e-5, loraplus_lr_ratio=16
)
rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
assert len(rates) == 2 and max(rates) / min(rates) == 16
"""

SNIPPETS["lora: merge"] = """
from peft import PeftModel
model = PeftModel.from_pretrained(base, adapter_0)
expected = model(tokens).logits
model.merge_adapter()
assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
model.unmerge_adapter()
merged = model.merge_and_unload(safe_merge=True)
assert type(merged) is type(fresh()) and torch.allclose(merged(tokens).logits, expected, atol=1e-5)
"""

SNIPPETS["lora: unload"] = """
from peft import PeftModel
before = base(tokens).logits
model = PeftModel.from_pretrained(base, adapter_0)
assert torch.equal(model.unload()(tokens).logits, before)
"""

SNIPPETS["lora: load and switch adapters"] = """
from peft import PeftModel
model = PeftModel.from_pretrained(base, adapter_0, adapter_name="adapter_1")
first = model(tokens).logits
model.load_adapter(adapter_1, adapter_name="adapter_2")
model.set_adapter("adapter_2")
assert model.active_adapters == ["adapter_2"] and not torch.allclose(model(tokens).logits, first)
with model.disable_adapter():
    assert torch.allclose(model(tokens).logits, fresh()(tokens).logits, atol=1e-6)
model.delete_adapter("adapter_2")
assert list(model.peft_config) == ["adapter_1"]
"""

SNIPPETS["lora: mixed batch"] = """
from peft import PeftModel
model = PeftModel.from_pretrained(base, adapter_0, adapter_name="adapter_fr")
model.load_adapter(adapter_1, adapter_name="adapter_de")
model.eval()
rows = tokens[:1].repeat(3, 1)
adapter_names = ["__base__", "adapter_fr", "adapter_de"]
output = model(input_ids=rows, adapter_names=adapter_names).logits
model.set_adapter("adapter_de")
assert torch.allclose(output[2], model(rows).logits[2], atol=1e-5)
assert not torch.allclose(output[0], output[1])
assert model.generate(input_ids=rows, adapter_names=adapter_names, max_new_tokens=2).shape[0] == 3
"""

SNIPPETS["helpers: rescale"] = """
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
model = PeftModel.from_pretrained(base, adapter_0)
full = model(tokens).logits
with rescale_adapter_scale(model, 0.5):
    half = model(tokens).logits
with rescale_adapter_scale(model, 0.0):
    assert torch.allclose(model(tokens).logits, fresh()(tokens).logits, atol=1e-6)
assert not torch.allclose(full, half) and torch.equal(model(tokens).logits, full)
"""

SNIPPETS["helpers: signatures"] = """
from peft import LoraConfig, get_peft_model
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, update_forward_signature
from peft.helpers import update_generate_signature, update_signature
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
update_forward_signature(model)
update_generate_signature(model)
update_signature(model)
assert check_if_peft_model(adapter_0) and not check_if_peft_model(model_id)
with disable_input_dtype_casting(model):
    model(tokens)
"""

# developer_guides/quantization

SNIPPETS["quantization: 4 bit"] = """
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=config)
model = prepare_model_for_kbit_training(model)
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="none", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model(input_ids=tokens, labels=tokens).loss.backward()
"""

# package_reference/hotswap

SNIPPETS["hotswap"] = """
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
model = PeftModel.from_pretrained(base, adapter_0)
prepare_model_for_compiled_hotswap(model, target_rank=8)
with torch.inference_mode():
    first = model(tokens).logits
hotswap_adapter(model, adapter_1, adapter_name="default", torch_device="cpu")
with torch.inference_mode():
    second = model(tokens).logits
assert torch.allclose(second, PeftModel.from_pretrained(fresh(), adapter_1)(tokens).logits, atol=1e-5)
assert not torch.allclose(first, second)
"""

SNIPPETS["hotswap: state dict"] = """
from peft import PeftModel, load_peft_weights
from peft.utils.hotswap import hotswap_adapter_from_state_dict
model = PeftModel.from_pretrained(base, adapter_0)
weights = load_peft_weights(adapter_0, device="cpu")
state_dict = {key.replace(".weight", ".default.weight"): value * 2 for key, value in weights.items()}
hotswap_adapter_from_state_dict(model, state_dict, adapter_name="default", config=model.peft_config["default"])
"""

# developer_guides/model_merging

for _type in ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd"):
    SNIPPETS[f"model_merging: {_type}"] = f"""
from peft import LoraConfig, PeftModel
model = PeftModel.from_pretrained(base, adapter_0, adapter_name="norobots")
model.add_adapter("adcopy", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
density = {{"density": 0.5}} if {_type!r}.startswith(("ties", "dare", "magnitude")) else {{}}
model.add_weighted_adapter(["norobots", "adcopy"], [2.0, 0.3], "merge", combination_type={_type!r}, **density)
model.set_adapter("merge")
assert torch.isfinite(model(tokens).logits).all() and model.active_adapters == ["merge"]
"""

SNIPPETS["model_merging: IA3"] = """
from peft import IA3Config, get_peft_model
config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)
model = get_peft_model(base, config, adapter_name="adapter_1")
model.add_adapter("adapter_2", config)
model.add_weighted_adapter(["adapter_1", "adapter_2"], [0.5, 0.5], "merged")
model.set_adapter("merged")
model(tokens)
"""

SNIPPETS["merge_utils"] = """
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
tensors, weights = [torch.ones(2, 2), torch.full((2, 2), -3.0)], torch.tensor([1.0, 0.5])
assert torch.equal(task_arithmetic(tensors, weights), torch.full((2, 2), -0.5))
"""

# developer_guides/low_level_api

_DUMMY = """
class DummyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 10)
        self.linear = torch.nn.Linear(10, 10)
        self.lm_head = torch.nn.Linear(10, 10)

    def forward(self, input_ids):
        return self.lm_head(self.linear(self.embedding(input_ids)))
"""

SNIPPETS["low_level_api"] = f"""
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
{_DUMMY}
config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"])
model = inject_adapter_in_model(config, DummyModel())
model(torch.arange(8)[None])
state_dict = get_peft_model_state_dict(model)
assert set(state_dict) == {{"linear.lora_A.weight", "linear.lora_B.weight"}}
model = inject_adapter_in_model(config, DummyModel())
assert set_peft_model_state_dict(model, state_dict).unexpected_keys == []
"""

SNIPPETS["low_level_api: meta device"] = f"""
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
{_DUMMY}
config = LoraConfig(r=4, target_modules=["linear"])
state_dict = get_peft_model_state_dict(inject_adapter_in_model(config, DummyModel()))
model = inject_adapter_in_model(config, DummyModel(), low_cpu_mem_usage=True)
assert model.linear.lora_A["default"].weight.device.type == "meta"
set_peft_model_state_dict(model, state_dict, low_cpu_mem_usage=True)
assert model.linear.lora_A["default"].weight.device.type == "cpu"
"""

SNIPPETS["low_level_api: from a state dict"] = f"""
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
{_DUMMY}
state_dict = get_peft_model_state_dict(inject_adapter_in_model(LoraConfig(target_modules=["linear"]), DummyModel()))
model = inject_adapter_in_model(LoraConfig(target_modules=["linear"]), DummyModel(), state_dict=state_dict)
assert hasattr(model.linear, "lora_A") and not hasattr(model.lm_head, "lora_A")
"""

SNIPPETS["functional"] = f"""
from peft import LoraConfig
from peft.functional import (
    cast_adapter_dtype, delete_adapter, get_peft_model_state_dict, inject_adapter_in_model, set_adapter,
    set_peft_model_state_dict, set_requires_grad,
)
{_DUMMY}
config = LoraConfig(target_modules=["linear"])
model = inject_adapter_in_model(config, DummyModel(), "first")
inject_adapter_in_model(config, model, "second")
set_adapter(model, "second")
set_requires_grad(model, "second", requires_grad=False)
assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
cast_adapter_dtype(model, "first")
delete_adapter(model, "first", prefix="lora_")
assert get_peft_model_state_dict(model, adapter_name="second")
"""

# developer_guides/checkpoint

SNIPPETS["checkpoint"] = """
import json
from pathlib import Path
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), adapter_name="other")
model.save_pretrained(folder)
saved = load_file(Path(folder) / "other" / "adapter_model.safetensors")
assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in saved
assert set(saved) == set(get_peft_model_state_dict(model, adapter_name="other"))
names = dict(model.named_parameters())
assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight" in names
config = json.loads((Path(folder) / "other" / "adapter_config.json").read_text())
assert config["peft_type"] == "LORA" and config["target_modules"] == ["q_proj"]
assert (Path(folder) / "README.md").is_file() or (Path(folder) / "other" / "README.md").is_file()
"""

SNIPPETS["checkpoint: least config"] = """
import json, shutil
from pathlib import Path
from peft import PeftModel
shutil.copytree(adapter_0, folder, dirs_exist_ok=True)
fields = {"target_modules": ["q_proj", "v_proj"], "peft_type": "LORA", "r": 4}
(Path(folder) / "adapter_config.json").write_text(json.dumps(fields))
assert PeftModel.from_pretrained(base, folder).peft_config["default"].r == 4
"""

SNIPPETS["checkpoint: merged"] = """
from peft import PeftModel
from transformers import AutoModelForCausalLM
merged = PeftModel.from_pretrained(base, adapter_0).merge_and_unload()
merged.save_pretrained(folder)
assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, merged(tokens).logits, atol=1e-5)
"""

SNIPPETS["checkpoint: converted to transformers"] = """
from peft import PeftModel
from transformers import AutoModelForCausalLM
expected = PeftModel.from_pretrained(base, adapter_0)(tokens).logits
model_loaded = AutoModelForCausalLM.from_pretrained(adapter_0)
assert torch.allclose(model_loaded(tokens).logits, expected, atol=1e-5)
model_loaded._hf_peft_config_loaded = False
model_loaded.save_pretrained(folder)
"""

# developer_guides/custom_models

_MLP = """
from torch import nn

class MLP(nn.Module):
    def __init__(self, units=20):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(20, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 2), nn.LogSoftmax(-1)
        )

    def forward(self, X):
        return self.seq(X)
"""

SNIPPETS["custom_models: MLP"] = f"""
from peft import LoraConfig, PeftModel, get_peft_model
{_MLP}
model = MLP()
config = LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"])
peft_model = get_peft_model(model, config)
peft_model.print_trainable_parameters()
assert peft_model.targeted_module_names == ["seq.0", "seq.2"]
optimizer = torch.optim.Adam(peft_model.parameters(), lr=0.002)
loss = nn.functional.nll_loss(peft_model(torch.rand(8, 20)), torch.zeros(8, dtype=torch.long))
loss.backward()
optimizer.step()
peft_model.save_pretrained(folder)
"""

SNIPPETS["custom_models: pattern"] = r"""
from peft import LoraConfig, get_peft_model
config = LoraConfig(target_modules=r".*\.mlp\.(up|down)_proj", modules_to_save=["lm_head"])
model = get_peft_model(base, config)
assert all(name.endswith(("up_proj", "down_proj")) for name in model.targeted_module_names)
assert "lora.Linear" in repr(model)
"""

SNIPPETS["custom_models: custom layers"] = """
from torch import nn
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

class MyLoraLSTMLayer(nn.Module, LoraLayer):
    def __init__(self, base_layer, adapter_name, r=8, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.lora_A[adapter_name] = nn.Linear(4, r)
        self.lora_B[adapter_name] = nn.Linear(r, 4)

    def forward(self, x):
        output, state = self.base_layer(x)
        return output + self.lora_B["default"](self.lora_A["default"](x)), state

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x):
        return self.lstm(x)[0]

config = LoraConfig(target_modules=["lstm"])
config._register_custom_module({nn.LSTM: MyLoraLSTMLayer})
peft_model = get_peft_model(Model(), config)
assert isinstance(peft_model.base_model.model.lstm, MyLoraLSTMLayer)
peft_model(torch.rand(2, 3, 4)).sum().backward()
"""

SNIPPETS["custom_models: usual targets"] = """
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as same
assert same["mistral"] == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["mistral"] == ["q_proj", "v_proj"]
"""

# developer_guides/troubleshooting

SNIPPETS["troubleshooting: dtypes"] = """
from peft import LoraConfig, cast_mixed_precision_params, get_peft_model
model = get_peft_model(base.to(torch.float16), LoraConfig(target_modules=["q_proj"]))
assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
model = get_peft_model(
    fresh().to(torch.float16), LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False
)
assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
cast_mixed_precision_params(model, dtype=torch.float16)
assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
"""

SNIPPETS["troubleshooting: trainable by hand"] = """
from peft import LoraConfig, get_peft_model
model = get_peft_model(base.to(torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
for param in model.parameters():
    if param.requires_grad:
        param.data = param.data.float()
model.save_pretrained(folder, save_embedding_layers=False)
"""

SNIPPETS["troubleshooting: status"] = """
from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
layers = model.get_layer_status()
assert layers[0].name == "model.model.layers.0.self_attn.q_proj" and layers[0].active_adapters == ["default"]
assert layers[0].requires_grad == {"default": True} and layers[0].module_type == "lora.Linear"
status = model.get_model_status()
assert status.enabled is True and status.merged_adapters == [] and status.base_model_type == "LlamaForCausalLM"
assert get_layer_status(model) == layers and get_model_status(model) == status
import dataclasses
assert {"name", "module_type", "devices"} <= set(dataclasses.asdict(layers[0]))
"""

SNIPPETS["troubleshooting: new tokens"] = """
from peft import LoraConfig, PeftModel, get_peft_model
base.resize_token_embeddings(base.config.vocab_size + 3)
model = get_peft_model(base, LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"]))
model.save_pretrained(folder, save_embedding_layers=True)
larger = fresh()
larger.resize_token_embeddings(base.config.vocab_size)
PeftModel.from_pretrained(larger, folder)
"""

SNIPPETS["troubleshooting: weights of an adapter"] = """
from peft import PeftModel
model = PeftModel.from_pretrained(base, adapter_0, is_trainable=True)
model.add_adapter("fresh", model.peft_config["default"])
assert model.active_adapter == "default"
model.set_adapter("fresh")
assert model.active_adapter == "fresh"
"""

SNIPPETS["troubleshooting: merged sum"] = """
from peft import PeftModel
model = PeftModel.from_pretrained(base, adapter_0, adapter_name="first")
model.load_adapter(adapter_1, adapter_name="second")
model.base_model.set_adapter(["first", "second"])
expected = model(tokens).logits
assert torch.allclose(model.merge_and_unload(adapter_names=["first", "second"])(tokens).logits, expected, atol=1e-5)
"""

# developer_guides/torch_compile

SNIPPETS["torch_compile"] = """
from peft import LoraConfig, get_peft_model
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
compiled = torch.compile(model, backend="eager")
assert torch.allclose(compiled(tokens).logits, model(tokens).logits, atol=1e-5)
"""

# accelerate, integrations, package_reference

SNIPPETS["fsdp"] = """
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
policy = fsdp_auto_wrap_policy(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
assert policy(base.model.layers[0], False, 0)
"""

SNIPPETS["integrations: isinstance"] = """
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, _get_submodules
model = get_peft_model(
    base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
)
assert isinstance(model, (PeftModel, PeftModelForCausalLM)) and isinstance(model.base_model, BaseTuner)
parent, target, name = _get_submodules(base, "model.layers.0.self_attn.q_proj")
assert name == "q_proj" and isinstance(target, Linear) and isinstance(target, LoraLayer)
assert isinstance(target, BaseTunerLayer) and not isinstance(parent, BaseTunerLayer)
assert isinstance(base.lm_head, ModulesToSaveWrapper)
"""

SNIPPETS["integrations: scale by hand"] = """
from peft import PeftModel
from peft.tuners.lora import LoraLayer
model = PeftModel.from_pretrained(base, adapter_0)
for module in model.modules():
    if isinstance(module, LoraLayer):
        assert isinstance(module.scaling, dict)
        module.scaling["default"] = 0.0
assert torch.allclose(model(tokens).logits, fresh()(tokens).logits, atol=1e-6)
"""

SNIPPETS["integrations: transformers"] = """
from peft import LoraConfig
base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="first")
adapted = base(tokens).logits
base.disable_adapters()
assert not torch.allclose(base(tokens).logits, adapted)
base.enable_adapters()
assert base.active_adapters() == ["first"] and torch.allclose(base(tokens).logits, adapted)
base.save_pretrained(folder)
again = fresh()
again.load_adapter(folder, adapter_name="second")
again.set_adapter("second")
assert torch.allclose(again(tokens).logits, adapted, atol=1e-5)
"""

SNIPPETS["names that are only imported"] = """
from peft import (
    AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig,
    PromptEncoderConfig, PromptTuningConfig, PromptTuningInit, TaskType, VeraConfig, get_peft_config, get_peft_model,
    get_peft_model_state_dict, set_peft_model_state_dict, PeftType, __version__,
)
config = LoraConfig()
assert config.peft_type not in (PeftType.PREFIX_TUNING, PeftType.P_TUNING) and config.peft_type == PeftType.LORA
assert not isinstance(config, (PrefixTuningConfig, PromptTuningConfig)) and __version__
assert isinstance(get_peft_config({"peft_type": "LORA", "r": 2}), PeftConfig)
"""


def tiny() -> Any:
    """The causal language model of the snippets."""
    from tests import tiny_models

    return tiny_models.llama().eval()


def prepare(folder: Path) -> None:
    """Writes the model and the two adapters, with PEFT."""
    import peft

    model = tiny()
    model.save_pretrained(folder / "model")
    for number, rank in enumerate((4, 8)):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(tiny(), config)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
        adapted.save_pretrained(str(folder / f"adapter_{number}"))


def run(name: str, library: str, folder: Path) -> None:
    """Runs a snippet with one library: the word is replaced where that is nbpeft."""
    code = SNIPPETS[name]
    if library == "nbpeft":
        code = code.replace("from peft", "from nbpeft").replace("import peft", "import nbpeft")
    base = tiny()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as empty:
        names: dict[str, Any] = {
            "__name__": "snippet",
            "torch": torch,
            "base": base,
            "fresh": tiny,
            "tokens": torch.arange(12).reshape(2, 6) + 3,
            "folder": empty,
            "model_id": str(folder / "model"),
            "adapter_0": str(folder / "adapter_0"),
            "adapter_1": str(folder / "adapter_1"),
        }
        exec(compile(code, name, "exec"), names)


def main(library: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    if library == "as-peft":
        from nbpeft import install_as_peft

        install_as_peft()
    errors: dict[str, str] = {}
    for name in SNIPPETS:
        try:
            run(name, library, Path(folder))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error} {traceback.format_exc(limit=-2)[-600:]}"
    print(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
