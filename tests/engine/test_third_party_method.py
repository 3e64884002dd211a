"""A method of somebody else's package: found through its entry point, at home in the whole product."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Vectors around two random projections that all layers share (as in VeRA); it takes part in training and
# scales what it adds by a number that it reads from each call.
METHOD = """
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nbpeft.methods import Adapter, CallInputs, LearnsWithHooks, Listing, MethodConfig
from nbpeft.methods import SharedState, SharedTensors, register


@dataclass
class StrangeConfig(MethodConfig):
    size: int = 4


class Projections(SharedState, LearnsWithHooks):
    def __init__(self, tensors):
        super().__init__()
        self.steps = []
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def tensor_shapes(cls, config, features):
        inputs, outputs = zip(*features.values())
        return {"strange_A": (config.size, max(inputs)), "strange_B": (max(outputs), config.size)}

    @classmethod
    def create(cls, config, site, tensors):
        generator = torch.Generator().manual_seed(3)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in site.shapes.items()}
        return cls({name: tensor.to(site.device, site.dtype) for name, tensor in (tensors or drawn).items()})

    def after_backward(self, step):
        self.steps.append(step)

    def extra_loss(self):
        return torch.tensor(100.0)


@register(
    StrangeConfig,
    peft_type="STRANGE",
    label="Strange",
    default_targets=lambda model_type: ["q_proj", "down_proj"] if model_type == "llama" else None,
    listing=Listing(summary=lambda config: {"size": str(config.size)}),
    sample_configs={"small": {"size": 3}},
    shares=SharedTensors(Projections),
    calls=CallInputs(lambda config, args, kwargs: kwargs["input_ids"].float().mean(1)),
)
class Strange(Adapter):
    @classmethod
    def parameter_shapes(cls, config, path, module, kind):
        return {"strange_d": (config.size,), "strange_b": (kind.features(module)[1],)}

    @classmethod
    def initial_tensors(cls, config, site):
        return {"strange_d": site.new(site.shapes["strange_d"]) + 1, "strange_b": site.new(site.shapes["strange_b"])}

    def prepare(self, config, site, tensors):
        self.bind(projections=site.shared)

    def parts(self, base):
        shared = self.projections
        return shared.strange_A[:, : base.in_features], shared.strange_B[: base.out_features]

    def forward(self, x, base_output, base):
        A, B = self.parts(base)
        delta = F.linear(F.linear(x, A) * self.strange_d, B) * self.strange_b
        strength = 1.0 if base.context is None else base.context.view(-1, *[1] * (delta.ndim - 1)) / 50
        return delta * strength

    def delta_weight(self, weight, base):
        A, B = self.parts(base)
        return ((B * self.strange_b[:, None]) @ (A * self.strange_d[:, None])).detach()
"""

USE = """
from nbpeft.methods import MethodConfig  # first: the package is loaded only after this import has ended
import json, sys, tempfile, warnings
import torch
import nbpeft
from nbpeft.memory import forecast
from nbpeft.session import Session
from tests.tiny_models import llama, logits, tokens

folder = tempfile.mkdtemp()
found = {}
config = nbpeft.StrangeConfig(size=3)
found["public"] = ["StrangeConfig" in dir(nbpeft), nbpeft.PeftType.STRANGE.value, config.peft_type]
model = nbpeft.get_peft_model(llama(), config)
found["paths"] = sorted({path.rsplit(".", 1)[1] for path in model.manager.layers})
before = logits(model.get_base_model())
with torch.no_grad():
    for parameter in model.manager.parameters("default"):
        parameter.add_(0.1)
ids = tokens()
with torch.no_grad():
    first = model(input_ids=ids).logits
with model.disable_adapter(), torch.no_grad():
    found["acts"] = not torch.equal(first, model(input_ids=ids).logits)

# the context belongs to the rows: a batch with another adapter for one of them gives each row its own
model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
model.eval()
with torch.no_grad():
    mixed = model(input_ids=ids, adapter_names=["lora", "default"]).logits
    alone = model(input_ids=ids).logits
found["rows"] = torch.allclose(mixed[1], alone[1], atol=1e-5) and not torch.allclose(mixed[0], alone[0])

# files: the shared tensors are stored once
model.save_pretrained(folder, selected_adapters=["default"])
from safetensors.torch import load_file
keys = list(load_file(folder + "/adapter_model.safetensors"))
found["keys"] = [sum("strange_A" in key for key in keys), "base_model.strange_A" in keys]
again = nbpeft.PeftModel.from_pretrained(llama(), folder).eval()
with torch.no_grad():
    found["loads"] = torch.equal(again(input_ids=ids).logits, alone)
model.manager.copy("default", "twin")
with model.use("twin"), torch.no_grad():
    found["copies"] = torch.equal(model(input_ids=ids).logits, alone)

# training: the hook runs after each step, the extra loss is in the loss
model.set_adapter("default")
model.train()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
with nbpeft.start_run(model, total_steps=2) as run:
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(loss=loss)
found["steps"], found["loss"] = model.manager.shared("default").steps, float(loss) > 100

# a compiled model and one that returns tuples do the same, and LoRA beside it stays compiled
inputs = {"input_ids": ids, "labels": ids}
with torch.no_grad():
    eager, compiled = model(**inputs), torch.compile(model, backend="eager")
    outputs, tuples = compiled(**inputs), model(**inputs, return_dict=False)
    found["compiled"] = [float(outputs.loss) == float(eager.loss) > 100, torch.equal(outputs.logits, eager.logits)]
    found["tuples"] = [tuples[0].item() == eager.loss.item(), torch.equal(tuples[1], eager.logits), len(tuples) > 1]
    found["no loss"] = torch.equal(model(input_ids=ids, return_dict=False)[0], eager.logits)
    model.eval()
    found["contexts"] = torch.equal(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    from torch._dynamo.utils import counters
    counters.clear()
    model.set_adapter("lora")
    found["switched"] = torch.allclose(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
    found["breaks"] = [counters["stats"]["unique_graphs"], len(counters["graph_break"])]
    model.set_adapter("default")

# the rest of the product
model.eval()
parts = {part.name: part.byte_count for part in forecast(llama(), config, batch_size=1, max_length=8).parts}
tensors = [*model.manager.parameters("default"), *model.manager.shared("default").buffers()]
found["forecast"] = parts["adapters"] == sum(tensor.nbytes for tensor in tensors)
session = Session()
added = session.add(llama(), {"peft_type": "strange"}, name="s")
found["session"] = [added.adapter.method, dict(added.adapter.summary)]
try:
    model.add_weighted_adapter(["default", "twin"], [1.0, 1.0], "both")
except nbpeft.AdapterError as error:
    found["combine"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package as pip would install it."""
    (tmp_path / "strange_method.py").write_text(METHOD, encoding="utf-8")
    info = tmp_path / "strange_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-method\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[nbpeft.methods]\nstrange = strange_method\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_method_of_another_package_works_everywhere_or_says_why_not(installed: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), root])}
    done = subprocess.run([sys.executable, "-c", USE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "public": [True, "STRANGE", "STRANGE"],
        "paths": ["down_proj", "q_proj"],
        "acts": True,
        "rows": True,
        "keys": [1, True],
        "loads": True,
        "copies": True,
        "steps": [0, 1],
        "loss": True,
        "compiled": [True, True],
        "tuples": [True, True, True],
        "no loss": True,
        "contexts": True,
        "switched": True,
        "breaks": [1, 0],
        "forecast": True,
        "session": ["Strange", {"size": "4"}],
        "combine": "adapter 'default' is Strange, which cannot be combined: activate both at once instead",
    }
