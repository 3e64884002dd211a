"""AdaMSS against peft's: its clusters and start, files that do not hold them, and the subspaces that training drops."""

from __future__ import annotations

import contextlib
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adamss import model as peft_model
from safetensors.torch import load_file, save_file

import nbpeft
from nbpeft.engine.methods.projections import adamss
from nbpeft.engine.methods.projections.decomposition import main_directions, row_clusters
from nbpeft.errors import BaseMismatchError, ConfigError
from nbpeft.model import PeftModel, get_peft_model, merge_to_folder
from tests.closeness import SINGULAR_VECTORS, assert_approximates, assert_close, differ
from tests.tiny_models import llama, logits, randomize, tokens

FIELDS: dict[str, Any] = {"r": 8, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["q_proj", "down_proj"]}
SCHEDULE: dict[str, Any] = {
    **{"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 9, "mask_interval": 3},
    **{"init_weights": None, "asa_importance_beta": 0.6, "asa_uncertainty_beta": 0.7, "asa_schedule_exponent": 1.0},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def drawn(rows: int, columns: int, seed: int | None = None) -> Any:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows if seed is None else seed))


def first_layer(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize(
    ("rows", "columns", "count", "expected"),
    [
        (24, 3, 3, "002112010012021102210101"),
        (40, 5, 6, "4543410544314141445310255121244240150121"),
        (30, 1, 9, "352363505333355013807247705585"),
    ],
)
def test_clusters_are_those_of_scikit_learn(rows: int, columns: int, count: int, expected: str) -> None:
    assert "".join(map(str, row_clusters(drawn(rows, columns), count).tolist())) == expected


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        pytest.param(drawn(40, 1, 8).pow(3), 8, "0265526512012555551110515135564727557155", id="centers hardly move"),
        pytest.param(drawn(40, 1, 3), 3, "2202121022221222210012220122012022011000", id="too few iterations"),
        pytest.param(drawn(12, 3, 5), 5, "124412011341", id="a cluster is empty"),
        pytest.param(drawn(10, 1, 0).repeat(2, 1), 3, "02121120120212112012", id="two centers are equal"),
        pytest.param(drawn(6, 1, 7).repeat(2, 1), 5, "011243011243", id="rows of two clusters are moved"),
    ],
)
def test_so_they_are_where_it_ends_early_or_a_cluster_has_no_rows(rows: Any, count: int, expected: str) -> None:
    assert "".join(map(str, row_clusters(rows, count).tolist())) == expected


def test_clusters_of_equal_rows_are_as_many_as_there_are_different_ones() -> None:
    rows = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).repeat(4, 1)
    assert row_clusters(rows, 5).tolist() in ([0, 1] * 4, [1, 0] * 4)


@pytest.mark.parametrize(("rows", "columns"), [(20, 12), (9, 30), (15, 15)])
def test_directions_are_those_of_the_randomized_svd(rows: int, columns: int) -> None:
    matrix = drawn(rows, columns)
    torch.default_generator.manual_seed(5)  # not another seed of ``tests.margins``
    left, _, right = torch.svd_lowrank(matrix, q=4, niter=2)
    found = main_directions(matrix, 4, 5)
    assert_approximates(found, (left, right.T), SINGULAR_VECTORS)


@pytest.mark.parametrize(
    "changes", [{}, {"init_weights": None}, {"r": 100, "num_subspaces": 40, "random_seed": 3, "init_weights": False}]
)
def test_start_is_that_of_peft(changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    ours: Any = get_peft_model(llama(), nbpeft.AdamssConfig(**FIELDS | changes))
    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(llama(), peft.AdamssConfig(**FIELDS | changes))
    expected, found = peft.get_peft_model_state_dict(theirs), nbpeft.get_peft_model_state_dict(ours)
    clusters = {key for key in found if key.endswith("adamss_clusters")}
    assert found.keys() - clusters == expected.keys() and len(clusters) == 4
    for key, tensor in expected.items():
        assert_approximates(found[key].detach(), tensor, SINGULAR_VECTORS)
    assert_close(logits(ours), logits(theirs))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    names = [[name for name, one in model.named_parameters() if one.requires_grad] for model in (ours, theirs)]
    assert names[0] == names[1]


def test_a_weight_is_parted_once_and_a_config_keeps_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, parted = [], adamss.main_directions
    monkeypatch.setattr(adamss, "main_directions", lambda *given: counted.append(1) or parted(*given))
    model = get_peft_model(llama(), nbpeft.AdamssConfig(**FIELDS))
    assert len(counted) == 4
    assert not vars(model.peft_config["default"]).get("parted")


def test_a_dynamic_rank_is_that_of_peft() -> None:
    ranks = set()
    for threshold in (0.2, 0.4, 0.7):
        fields = {**FIELDS, "subspace_rank": 6, "use_dynamic_rank": True, "svd_threshold": threshold}
        ours = nbpeft.get_peft_model_state_dict(get_peft_model(llama(), nbpeft.AdamssConfig(**fields)))
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(llama(), peft.AdamssConfig(**fields)))
        assert {key: ours[key].shape for key in theirs} == {key: one.shape for key, one in theirs.items()}
        ranks |= {one.shape[0] for key, one in ours.items() if "adamss_A" in key}
    assert len(ranks) > 3


def test_lists_of_parameters_are_those_of_peft() -> None:
    model: Any = get_peft_model(llama(), nbpeft.AdamssConfig(**FIELDS))
    layer = first_layer(model)
    listed = layer.adamss_A["default"]
    assert len(listed) == len(list(listed)) == 3 and layer.num_subspaces["default"] == 3
    assert listed[1] is model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.adamss_A.default.1")
    assert layer.adapter_layer_names == ("adamss_A", "adamss_B") and layer.adamss_newB["default"].shape == (8, 33)
    with torch.no_grad():
        layer.adamss_B["default"][2] = torch.nn.Parameter(torch.ones_like(layer.adamss_B["default"][2]))
    assert layer.adapters["default"]._parameters["adamss_B.2"].sum() > 0
    model.add_adapter("second", nbpeft.AdamssConfig(**FIELDS | {"num_subspaces": 2}))
    assert len(layer.adamss_A["second"]) == 2 and layer.adamss_A["default"] is listed
    assert isinstance(layer, nbpeft.tuners.adamss.AdamssLayer)


def saved(folder: Path, **changes: Any) -> PeftModel:
    model = get_peft_model(llama(), nbpeft.AdamssConfig(**FIELDS | changes)).eval()
    randomize(model, scale=0.2)
    model.save_pretrained(folder)
    return model


def other_base() -> Any:
    base = llama()
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.weight)
    return base


def without_clusters(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: one for key, one in tensors.items() if not key.endswith("adamss_clusters")}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_a_file_holds_its_clusters_and_one_of_peft_is_refused_elsewhere(tmp_path: Path) -> None:
    delta = first_layer(saved(tmp_path)).get_delta_weight("default")
    elsewhere = first_layer(PeftModel.from_pretrained(other_base(), tmp_path))
    assert_close(elsewhere.get_delta_weight("default"), delta)
    theirs = first_layer(peft.PeftModel.from_pretrained(other_base(), tmp_path))
    assert differ(theirs.get_delta_weight("default"), delta)  # silently another adapter
    without_clusters(tmp_path)
    again = first_layer(PeftModel.from_pretrained(llama(), tmp_path))
    assert_close(again.get_delta_weight("default"), delta)
    base = other_base()
    with pytest.raises(ConfigError, match=r"q_proj: the subspaces of the file have \[21, 9, 2\] outputs, those"):
        PeftModel.from_pretrained(base, tmp_path)
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="and this weight is not loaded"):
        merge_to_folder(tmp_path / "base", tmp_path, tmp_path / "out")


def test_a_file_with_other_clusters_or_sizes_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # the file below them is overwritten
    key = next(key for key in tensors if key.endswith("q_proj.adamss_clusters"))
    save_file({**tensors, key: tensors[key].flip(0) - 1}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="adamss_clusters in the file"):
        PeftModel.from_pretrained(llama(), tmp_path)
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"puts \[32, 0, 0\] outputs into the subspaces"):
        PeftModel.from_pretrained(llama(), tmp_path)
    key = key.replace("adamss_clusters", "adamss_B.1")
    save_file({**tensors, key: tensors[key][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="adamss_B"):
        PeftModel.from_pretrained(llama(), tmp_path)
    save_file({other: tensor for other, tensor in tensors.items() if other != key}, path, metadata={"format": "pt"})
    with pytest.warns(match="1 adapter key is missing"):
        PeftModel.from_pretrained(llama(), tmp_path)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match=r"adamss_B.0 is \(4, 2\)"):
        PeftModel.from_pretrained(llama(), tmp_path, config=nbpeft.AdamssConfig(**FIELDS | {"num_subspaces": 2}))


def train(model: Any, steps: int = 11) -> list[int]:
    """Trains, and says how many subspaces are trained after each step."""
    ids, left = tokens(), []
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        left.append(sum("adamss_A" in name and one.requires_grad for name, one in model.named_parameters()))
    return left


def gone(model: Any) -> list[str]:
    return [name for name, one in model.named_parameters() if "adamss_" in name and not one.requires_grad]


def test_training_drops_the_subspaces_that_it_drops_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, **SCHEDULE)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert train(theirs)[-1] == 2  # one fewer than the target
    mask = peft_model.AdamssModel._global_mask_to_target
    monkeypatch.setattr(
        peft_model.AdamssModel, "_global_mask_to_target", lambda self, target, *rest: mask(self, target + 1, *rest)
    )
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    ours = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    left = train(ours)
    assert left == train(theirs) and sorted(set(left)) == [3, 6, 9, 12]
    assert gone(ours) == gone(theirs)
    assert_close(logits(ours.eval()), logits(theirs.eval()))


def test_what_is_gone_stays_gone_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    saved(tmp_path, **SCHEDULE)
    once, twice = (PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True) for _ in range(2))
    allocate = twice.base_model.update_and_allocate

    def called_twice(step: int) -> None:
        allocate(step)
        allocate(step)

    twice.base_model.__dict__["update_and_allocate"] = called_twice
    assert train(once) == train(twice) and gone(once) == gone(twice)
    before = gone(once)
    once.set_adapter("default")
    assert not gone(once)
    train(once, 1)
    assert gone(once) == before


@pytest.mark.parametrize("tracks", [False, True])
def test_a_trainer_with_peft_s_callback_or_a_run_drops_them(tmp_path: Path, tracks: bool) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(), nbpeft.AdamssConfig(**FIELDS | SCHEDULE))
    rows = [{"input_ids": row, "labels": row} for row in tokens().tolist()] * 10
    options = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=10, per_device_train_batch_size=1, **options)
    callbacks = [] if tracks else [import_module("nbpeft.tuners.adamss.asa_callback").AdamssAsaCallback()]
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), callbacks=callbacks)
    with nbpeft.start_run(model) if tracks else contextlib.nullcontext():
        trainer.train()
    assert len(gone(model)) == 2 * (12 - 3)


def test_importance_of_one_layer_is_that_of_peft(tmp_path: Path) -> None:
    ours = saved(tmp_path, **SCHEDULE)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    ids = tokens()
    for model in (ours, theirs):
        layer = first_layer(model)
        for scale in (1.0, 3.0):
            model.zero_grad()
            (scale * model(input_ids=ids, labels=ids).loss).backward()
            layer.update_importance("default", 0.7, uncertainty_beta=0.8)
    for name in ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B"):
        found, expected = (getattr(first_layer(model), name)["default"] for model in (ours, theirs))
        assert_approximates(found, expected, SINGULAR_VECTORS)
    first_layer(ours).reset_importance("default")
    assert first_layer(ours).exp_avg_ipt_A["default"] == [None] * 3


def test_importance_is_measured_anew_after_each_pruning() -> None:
    model = get_peft_model(llama(), nbpeft.AdamssConfig(**FIELDS | SCHEDULE))
    adapter = first_layer(model).adapters["default"]
    ids = tokens()
    known = []
    for step in range(1, 5):
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
        known.append(bool(adapter.importance))
    assert known == [True, True, False, True]


@pytest.mark.parametrize("asks", [False, True])
def test_a_loop_that_calls_nothing_is_told_once_where_subspaces_should_go(asks: bool) -> None:
    model = get_peft_model(llama(), nbpeft.AdamssConfig(**FIELDS | SCHEDULE | {"use_asa": asks})).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = tokens()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    texts = [str(one.message) for one in caught if "update_and_allocate" in str(one.message)]
    assert len(texts) == asks and all("AdaMSS with use_asa=True takes no subspace away" in text for text in texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_weights": "zeros"}, "init_weights must be one of 'orthogonal', None, not 'zeros'"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval must be a positive whole number, not 0"),
        ({"use_asa": True, "asa_target_subspaces": 0}, "asa_target_subspaces"),
        ({"use_asa": True, "init_warmup": 1000}, "init_warmup = 1000 leaves no step until final_warmup = 1000"),
        ({"use_asa": True, "asa_schedule_exponent": 0}, "asa_schedule_exponent must be above 0, not 0"),
        ({"num_subspaces": 2**15}, "num_subspaces must be at most 32767, not 3.28e"),
        ({"random_seed": -1}, "random_seed"),
    ],
)
def test_configs_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nbpeft.AdamssConfig(**changes)
    assert nbpeft.AdamssConfig(mask_interval=0, init_warmup=2000).mask_interval == 0  # says nothing without use_asa
