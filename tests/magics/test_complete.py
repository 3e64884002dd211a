from __future__ import annotations

from pathlib import Path

import pytest

from nbpeft.magics.complete import CompletionSources, complete_body, complete_line, paths
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.matcher import Completion
from tests.magics.notebook import Notebook

SOURCES = CompletionSources(
    models=lambda: ["model", "other"],
    adapters=lambda: ["sql", "chat", "support"],
    variables=lambda: ["model", "train_ds", "tok"],
    combinations=lambda adapters: ["exact", "mean"] if "chat" in adapters else ["exact"],
    fields={"config": lambda method: ["r", "rank_pattern", "target_modules"], "training": lambda method: ["max_steps"]},
)
COMPLETION = Completion(SUBCOMMANDS, CELLS, SOURCES)


def words(before: str) -> tuple[str, ...]:
    return complete_line(before, SUBCOMMANDS, SOURCES).words


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("u", ("undo", "unmerge", "unload", "use")),
        ("use ", ("base", "sql", "chat", "support")),
        ("use s", ("sql", "support")),
        ("use sql ", ("base", "chat", "support")),
        ("use sql --m", ("--model",)),
        ("use sql # ", ()),
        ("use #", ()),
        ("use sql --model ", ("model", "other")),
        ("combine sql=1 chat --name c --type ", ("exact", "mean")),
        ("combine sql=1 --name c --type ", ("exact",)),
        ("delete sql ", ("chat", "support")),
        ("add ", ("model", "other")),
        ("add model r", ("r=", "rank_pattern=")),
        ("add model --name sql t", ("target_modules=",)),
        ("add model r=", ()),
        ("save --adapter s", ("sql", "support")),
        ("nonsense ", ()),
    ],
)
def test_what_may_come_next(before: str, expected: tuple[str, ...]) -> None:
    assert set(words(before)) == set(expected)
    assert len(words(before)) == len(expected)


def test_an_empty_line_offers_all_verbs() -> None:
    assert set(words("")) == {*SUBCOMMANDS, "help"}
    assert set(words("help ")) == set(SUBCOMMANDS)
    assert words("help pl") == ("plan",)


def test_paths_come_with_folders_first(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "b_folder").mkdir()
    (tmp_path / "with space").mkdir()
    (tmp_path / "[odd]").mkdir()
    found = paths(f"{tmp_path}/").words
    assert found == (f"{tmp_path}/[odd]/", f"{tmp_path}/b_folder/", f'"{tmp_path}/with space/"', f"{tmp_path}/a_file")
    assert paths(f"{tmp_path}/[").words == (f"{tmp_path}/[odd]/",)
    assert words(f"save {tmp_path}/b") == (f"{tmp_path}/b_folder/",)


def test_load_offers_what_can_be_loaded(tmp_path: Path) -> None:
    for name in ("saved/deep", "runs", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("saved/deep/adapter_config.json", "a.ipynb", "a.csv", "lora.safetensors", "other/adapter_model.bin"):
        (tmp_path / name).touch()
    for command in ("load", "swap"):
        assert words(f"{command} {tmp_path}/") == (f"{tmp_path}/saved/", f"{tmp_path}/lora.safetensors")


def fields() -> list[str]:
    return ["r", "lora_alpha", "lora_bias", "target_modules"]


def test_fields_in_a_body_that_are_not_set_yet() -> None:
    found = complete_body("lora_alpha = 3\nlora_", 1, 5, fields)
    assert found is not None
    assert found.words == ("lora_bias = ",)
    assert found.closed


@pytest.mark.parametrize(
    ("source", "line"), [("r = lora", 0), ("  lora", 0), ("target_modules = [\nlora", 1), ('x = """\nlora', 1)]
)
def test_where_python_may_stand_nothing_is_offered(source: str, line: int) -> None:
    assert complete_body(source, line, len(source.split("\n")[line]), fields) is None


def test_the_lines_of_a_cell() -> None:
    cell = "%%lora model --n\nr"
    first = COMPLETION.suggest(cell, 0, 16)
    assert first is not None
    assert first.words == ("--name", "--no-trainable")
    second = COMPLETION.suggest(cell, 1, 1)
    assert second is not None
    assert second.words == ("r = ", "rank_pattern = ")
    training = COMPLETION.suggest("%%lora_train model --data tr", 0, 28)
    assert training is not None
    assert training.words == ("train_ds",)


@pytest.mark.parametrize("cell", ["x = 1", "%timeit lora", "%%time\nuse ", "%lora", "%%lor", "", "lora use "])
def test_other_cells_are_left_alone(cell: str) -> None:
    lines = cell.split("\n")
    assert COMPLETION.suggest(cell, len(lines) - 1, len(lines[-1])) is None


def test_a_line_magic_further_down_a_cell() -> None:
    found = COMPLETION.suggest("x = 1\n  %lora use c", 1, 13)
    assert found is not None
    assert found.words == ("chat",)


@pytest.mark.parametrize(
    ("cell", "some", "others"),
    [
        ("%%lora model\ntarget_modules = ['", {"q_proj'", "down_proj'"}, {"all-linear'"}),
        ("%%lora model\ntarget_modules = ['q_proj', '", {"v_proj'"}, {"q_proj'"}),
        ("%%lora model\ntarget_modules = '", {"all-linear'", "v_proj'"}, set()),
        ("%%lora model\ntarget_modules = [\n  'q_proj',\n  'v", {"v_proj'"}, {"q_proj'"}),
        ("%%lora model\ninit_lora_weights = '", {"olora'", "pissa'"}, {"True"}),
        ("%%lora model\ninit_lora_weights = ", {"True", "False", "'olora'"}, set()),
        ("%%lora model\nuse_dora = ", {"True", "False"}, {"'True'"}),
        ("%%lora model\nbias = '", {"none'", "all'", "lora_only'"}, set()),
        ("%%lora model\ntask_type = '", {"CAUSAL_LM'", "SEQ_CLS'"}, set()),
        ("%%lora_train model --data x\nlr_scheduler_type = '", {"cosine'", "linear'"}, set()),
        ("%%lora_train model --data x\noptim = 'adamw", {"adamw_torch'"}, {"sgd'"}),
        ("%%lora_train model --data x\neval_strategy = ", {"'steps'", "'epoch'", "'no'"}, set()),
        ("%%lora_train model --data x\nsave_strategy = '", {"steps'"}, set()),
        ("%%lora_train model --data x\nreport_to = ['", {"wandb'", "tensorboard'"}, {"none'"}),
        ("%%lora_train model --data x\nbf16 = ", {"True", "False"}, set()),
        ("%%qlora x\nquant_type = '", {"nf4'", "fp4'"}, set()),
        ("%%qlora x\nbits = ", {"4", "8"}, set()),
        ("%%qlora x\ncompute_dtype = '", {"bfloat16'"}, set()),
        ("%lora add model r=8 init_lora_weights=", {"init_lora_weights=olora"}, set()),
        ("%lora add model target_modules=q_proj,", {"target_modules=q_proj,v_proj"}, {"target_modules=q_proj,q_proj"}),
        ("%lora plan model target_modules=q_proj,", {"target_modules=q_proj,v_proj"}, {"target_modules=q_proj,q_proj"}),
    ],
)
def test_the_values_of_a_field_and_nothing_else(
    notebook: Notebook, cell: str, some: set[str], others: set[str]
) -> None:
    found = set(notebook.complete(cell))
    assert some <= found and not others & found
    assert not any(word.startswith("%") or "." in word for word in found)


def test_a_quote_that_is_there_is_not_written_again(notebook: Notebook) -> None:
    cell = "%%lora model\nbias = 'l'"
    assert notebook.complete(cell, len(cell) - 1) == ["lora_only"]


def test_what_would_be_refused_is_not_offered(notebook: Notebook) -> None:
    from nbpeft import LoraConfig

    offered = notebook.complete("%%lora model\n")
    assert "lora_alpha = " in offered and "use_dora = " in offered
    assert not {f"{name} = " for name in LoraConfig.not_implemented} & set(offered)
    assert not {"peft_version = ", "base_model_name_or_path = "} & set(offered)
    assert "megatron_config" in LoraConfig.not_implemented
    assert "megatron_config" not in "".join(notebook.complete("%%lora model\nmegatron_c"))
    for item in offered:
        name = item.removesuffix(" = ")
        assert notebook.session.fields("config")[name].help, f"{name} has no help"


def test_where_a_field_takes_anything_python_completes(notebook: Notebook) -> None:
    notebook["rank_of_mine"] = 4
    assert "rank_of_mine" in notebook.complete("%%lora model\nr = rank_of")
    assert "rank_of_mine" in notebook.complete("%%lora model\ninit_lora_weights = rank_of")
