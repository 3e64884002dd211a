"""A training as a script: what it says, and that it trains the same, on one process, and on two under accelerate."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from packaging.requirements import Requirement
from safetensors.torch import load_file

import nbpeft
from nbpeft.errors import CheckpointError, ConfigError, TrainingError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from nbpeft.model.quantization.quantize import quantize_model
from nbpeft.training import export_script, prepare_model_for_kbit_training, train
from nbpeft.training.data.reading import reading
from nbpeft.training.loop.rows import model_inputs
from nbpeft.training.script.sources import short_targets, text_rows
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close, is_close
from tests.tiny_models import llama
from tests.training.data.test_tags import TOKENIZER as TAGGER_TOKENIZER
from tests.training.data.test_tags import tagger
from tests.training.support import token_rows, trainable

ROOT = Path(__file__).parents[2]
ARGUMENTS: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.05, "per_device_train_batch_size": 2, "seed": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path


def loaded(folder: Path, **config: Any) -> Any:
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return trainable(base, "sql", **config)


def constants(script: Path) -> dict[str, Any]:
    """The assignments at the top of a script."""
    body = ast.parse(script.read_text()).body
    found = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    return {name: ast.literal_eval(value) for name, value in found.items() if name != "HERE"}


def test_it_says_what_the_notebook_said(folder: Path) -> None:
    model = loaded(folder, lora_dropout=0.1, use_dora=True)
    rows = token_rows(6)
    files = export_script(model, folder / "train.py", rows, rows[:2], lr_scheduler_type="constant", **ARGUMENTS)
    found = constants(files.script)
    assert found["CONFIG"].pop("target_modules") == ["q_proj", "v_proj"]
    assert found["CONFIG"] == {"r": 4, "lora_dropout": 0.1, "use_dora": True}
    assert found["ARGUMENTS"] == {"output_dir": "train_output", "lr_scheduler_type": "constant", **ARGUMENTS}
    assert found["BASE"] == "base" and str(folder) not in files.script.read_text()
    assert [found["DATA"], found["EVAL_DATA"]] == [path.name for path in files.data]
    assert [path.name.split("-")[0] for path in files.data] == ["train_data", "train_eval"]
    assert [json.loads(line)["input_ids"] for line in files.data[0].read_text().splitlines()] == [
        row["input_ids"] for row in rows
    ]
    assert files.row_counts == (6, 2)
    assert 'dtype="float32"' in files.script.read_text()


@pytest.mark.parametrize(("double", "storage"), [(True, "uint8"), (False, "bfloat16")])
def test_a_quantized_base_is_loaded_quantized(folder: Path, double: bool, storage: str) -> None:
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = trainable(quantize_model(base, quant_type="fp4", double_quant=double, quant_storage=storage))
    text = export_script(model, folder / "train.py", token_rows(2)).script.read_text()
    words = re.sub(r"\s+", " ", text)
    assert (
        f'bits=4, quant_type="fp4", double_quant={double}, compute_dtype="float32"' in words and "nbpeft[bnb]>=" in text
    )
    assert (
        'prepare_model_for_kbit_training( nbpeft.load_quantized( str(HERE / BASE), model_class="LlamaForCausalLM"'
    ) in words


def test_a_gguf_file_is_named(folder: Path) -> None:
    (folder / "gguf").mkdir()
    (folder / "gguf" / "tiny.gguf").touch()
    text = export_script(loaded(folder), folder / "t.py", token_rows(2), base=str(folder / "gguf")).script.read_text()
    assert 'gguf_file="tiny.gguf"' in text and '"gguf>=' in text


def test_what_cannot_be_written_leaves_nothing_behind(folder: Path) -> None:
    model, before = loaded(folder), sorted(folder.iterdir())
    with pytest.raises(ConfigError, match="callbacks: objects of the notebook cannot be written"):
        export_script(model, folder / "train.py", token_rows(2), callbacks=[object()])
    with pytest.raises(ConfigError, match="a script's name ends in \\.py, not 'train'"):
        export_script(model, folder / "train", token_rows(2))
    with pytest.raises(TrainingError, match="the source of this LlamaForCausalLM is unknown"):
        export_script(trainable(llama()), folder / "train.py", token_rows(2))
    with pytest.raises(TrainingError, match="need a tokenizer"):
        export_script(model, folder / "train.py", [{"text": "a"}])
    assert sorted(folder.iterdir()) == before


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}? {{ m['content'] }} {% else %}! {{ m['content'] }} <end> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}! {% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": "a b " * size}, {"role": "assistant", "content": "c d" + " e" * size}]}
    for size in (1, 3, 2, 4, 1, 2)
]


def saved_tokenizer(place: Path) -> Any:
    """A tokenizer of words that a script can load, as loaded from a folder."""
    words = {word: number for number, word in enumerate(["<pad>", "<end>", "<unk>", "?", "!", *"abcdefgh"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(place)
    return transformers.AutoTokenizer.from_pretrained(place)


def test_rows_of_the_notebook_are_written_as_they_are(folder: Path) -> None:
    tokenizer = saved_tokenizer(folder / "base")
    rows = [{**row, "number": 3} for row in CHATS]
    files = export_script(loaded(folder), folder / "t.py", rows, 0.5, tokenizer=tokenizer, max_length=12, **ARGUMENTS)
    found, text = constants(files.script), files.script.read_text()
    assert [json.loads(line) for line in files.data[0].read_text().splitlines()] == CHATS and files.row_counts == (6,)
    assert found["EVAL_DATA"] == 0.5 and found["ARGUMENTS"]["max_length"] == 12
    assert "tokenizer = transformers.AutoTokenizer.from_pretrained(str(HERE / BASE))" in text
    assert files.notes == (
        "2 of 6 rows were truncated to the maximum length; columns not used: 'number'",
        "1 of the 3 held-out rows is also trained on (2 of 6 rows are repeats): eval_by='messages' keeps equal rows "
        "together",
    )
    pairs = [("a b", "c"), ("d", "e f")]
    files = export_script(loaded(folder), folder / "t.py", pairs, tokenizer=tokenizer)
    assert json.loads(files.data[0].read_text().splitlines()[1]) == {"prompt": "d", "completion": "e f"}


@pytest.mark.parametrize("packing", [True, False])
def test_sequences_of_packed_tokens_are_as_long_as_in_the_notebook(folder: Path, packing: bool) -> None:
    export_script(loaded(folder), folder / "run.py", token_rows(6), packing=packing, max_length=24)
    assert constants(folder / "run.py")["ARGUMENTS"].get("max_length") == (24 if packing else None)


def test_a_file_or_dataset_is_named_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rows").mkdir()
    (folder / "rows" / "text.csv").write_text("q,a,other\na b,c,1\nd,e,2\n")
    monkeypatch.chdir(folder / "rows")
    given: dict[str, Any] = {"tokenizer": saved_tokenizer(folder / "base")}
    given["columns"] = {"prompt": "q", "completion": "a"}
    files = export_script(loaded(folder), folder / "runs" / "t.py", "text.csv[:1]", "text.csv", **given)
    found = constants(files.script)
    assert (found["DATA"], found["EVAL_DATA"], found["BASE"]) == ("../rows/text.csv[:1]", "../rows/text.csv", "../base")
    assert found["ARGUMENTS"]["columns"] == given["columns"] and files.data == ()
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(CHATS).save_to_disk(folder / "chats")
    files = export_script(loaded(folder), folder / "t.py", str(folder / "chats"), tokenizer=given["tokenizer"])
    assert constants(files.script)["DATA"] == "chats" and '"datasets>=' in files.script.read_text()


def test_a_changed_tokenizer_is_saved_beside_the_script(folder: Path) -> None:
    tokenizer = saved_tokenizer(folder / "base")
    tokenizer.chat_template = TEMPLATE.replace("<end>", "h")
    files = export_script(loaded(folder), folder / "t.py", CHATS, tokenizer=tokenizer)
    assert constants(files.script)["TOKENIZER"] == "t_tokenizer"
    again = transformers.AutoTokenizer.from_pretrained(folder / "t_tokenizer")
    assert again.chat_template == tokenizer.chat_template
    files = export_script(loaded(folder), folder / "u.py", ["ab", "cd"], tokenizer=CharTokenizer())
    assert "TOKENIZER" not in constants(files.script) and not (folder / "u_tokenizer").exists()
    assert json.loads(files.data[0].read_text().splitlines()[0])["input_ids"] == [65, 66, 96]
    assert files.notes == ("the rows are tokenized: no script can load the tokenizer of this notebook",)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("all-linear", "all-linear"),
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "all-linear"),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (r".*\.0\.self_attn\.q_proj", r".*\.0\.self_attn\.q_proj"),
    ],
)
def test_targets_are_said_shortly(folder: Path, targets: Any, said: Any) -> None:
    model = loaded(folder, target_modules=targets)
    found = constants(export_script(model, folder / "t.py", token_rows(2)).script)
    assert found["CONFIG"]["target_modules"] == said


def test_fields_that_were_written_are_there_with_their_defaults_too(folder: Path) -> None:
    model = loaded(folder, r=8)
    assert "r" not in constants(export_script(model, folder / "t.py", token_rows(2)).script)["CONFIG"]
    files = export_script(model, folder / "t.py", token_rows(2), written=["r", "bias"])
    config = constants(files.script)["CONFIG"]
    assert config["r"] == 8 and config["bias"] == "none" and "lora_alpha" not in config


def test_a_base_that_lies_apart_from_the_script_is_named_by_its_whole_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folder)
    monkeypatch.setenv("HOME", str(folder))
    files = export_script(model, folder / "project" / "t.py", token_rows(2))
    assert constants(files.script)["BASE"] == str((folder / "base").resolve())
    assert any("give the base model's Hub id" in note for note in files.notes)
    monkeypatch.setenv("HOME", "/nowhere/home")
    assert constants(export_script(model, folder / "project" / "t.py", token_rows(2)).script)["BASE"] == "../base"


def test_its_dependencies_are_inline_metadata(folder: Path) -> None:
    text = export_script(loaded(folder), folder / "t.py", token_rows(2)).script.read_text()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    assert block is not None
    found = tomllib.loads(
        "".join(line.removeprefix("#").removeprefix(" ") for line in block["content"].splitlines(True))
    )
    assert found["requires-python"] == ">=3.11"
    names = [Requirement(text) for text in found["dependencies"]]
    assert [one.name for one in names] == ["nbpeft", "torch", "transformers"] and names[0].extras == {"train"}
    assert all(one.specifier.contains(importlib.metadata.version(one.name)) for one in names)
    assert str(names[1].specifier) in map(str, (Requirement(one).specifier for one in requires("nbpeft") or ()))


@pytest.mark.parametrize("quantized", [False, True])
def test_it_is_formatted_and_names_no_path_of_this_machine(folder: Path, quantized: bool) -> None:
    model = loaded(folder, target_modules="all-linear", rank_pattern={"q_proj": 8})
    model = trainable(quantize_model(model.unload())) if quantized else model
    given: dict[str, Any] = {"run_name": 'it\'s "one"', "optim_target_modules": [f"layers.{n}.mlp" for n in range(9)]}
    files = export_script(model, folder / "t.py", CHATS, 0.5, tokenizer=saved_tokenizer(folder / "base"), **given)
    assert str(folder) not in files.script.read_text()
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    for command in (["format", "--diff"], ["check"]):
        done = subprocess.run([ruff, *command, "--isolated", "t.py"], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout


HOSTILE = (
    '"""; open(__import__("sys") and "pwned", "w"); """',
    'a"""b',
    "1",
    "{0!r} {adapter} %s",
    "tail" + chr(92),
    "\u2028 \x0c \x85 é",
    "x" * 300,
)


@pytest.mark.filterwarnings("ignore:.*exclude_modules")
@pytest.mark.parametrize("text", HOSTILE)
def test_no_value_is_read_as_code(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=[text])
    model = get_peft_model(base, config, adapter_name=re.sub(r"[.\\]", "_", text))
    name = f"{text.replace('/', '_')[:100]}.py".replace("\udc80", "")
    files = export_script(model, name, token_rows(2), base=text, run_name=text, **ARGUMENTS)
    found = constants(files.script)
    assert (found["ADAPTER"], found["BASE"]) == (re.sub(r"[.\\]", "_", text), text)
    assert found["CONFIG"]["exclude_modules"] == [text] and found["ARGUMENTS"]["run_name"] == text
    assert text not in (ast.get_docstring(ast.parse(files.script.read_text(encoding="utf-8"))) or "")
    called = ast.parse(files.script.read_text(encoding="utf-8")).body[-1]
    assert ast.dump(called) == ast.dump(ast.parse("if __name__ == '__main__':\n    main()").body[0])
    kinds = {type(node) for node in ast.parse(files.script.read_text(encoding="utf-8")).body}
    assert kinds == {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.If}
    assert not (folder / "pwned").exists()


def test_tokens_are_left_out_and_told(folder: Path) -> None:
    secret = "hf_" + "a1B2" * 8
    given = {"hub_token": secret, "hub_model_id": "me/sql", "report_to": [f"https://x/{secret}"], "run_name": "a"}
    with pytest.warns(
        UserWarning, match=r"hub_token, report_to left out, because a script must not contain secrets.*HF_TOKEN"
    ) as told:
        files = export_script(loaded(folder), folder / "train.py", token_rows(2), **given, **ARGUMENTS)
    assert files.left_out == ("hub_token", "report_to")
    assert secret not in files.script.read_text() + repr(files) + str(told[0].message)
    assert constants(files.script)["ARGUMENTS"]["hub_model_id"] == "me/sql"


def test_rows_belong_to_their_script_and_old_ones_go(folder: Path) -> None:
    model, script = loaded(folder), folder / "train.py"
    first = export_script(model, script, token_rows(2), token_rows(3), **ARGUMENTS)
    other = export_script(model, folder / "train_data.py", token_rows(2), **ARGUMENTS)
    (folder / "train_data-mine.jsonl").write_text("mine")
    second = export_script(model, script, token_rows(4), **ARGUMENTS)
    assert constants(script)["DATA"] == second.data[0].name and "EVAL_DATA" not in constants(script)
    assert not any(path.exists() for path in first.data)
    assert (folder / "train_data-mine.jsonl").exists() and other.data[0].exists()


@pytest.mark.parametrize("present", ["print('mine')", "", "changed", "a folder"])
def test_a_file_that_was_not_exported_is_not_written_over_unasked(folder: Path, present: str) -> None:
    model, script, rows = loaded(folder), folder / "train.py", token_rows(2)
    if present == "changed":
        export_script(model, script, rows, **ARGUMENTS)
        script.write_text(script.read_text().replace("max_steps", "max_steps "))
    elif present == "a folder":
        script.mkdir()
    else:
        script.write_text(present)
    before = None if script.is_dir() else script.read_text()
    told = "train.py (was edited since its export|exists already and is not an exported script): choose another"
    with pytest.raises(CheckpointError, match=told):
        export_script(model, script, token_rows(3), **ARGUMENTS)
    assert before is None or script.read_text() == before
    if before is not None:
        export_script(model, script, rows, replace=True, **ARGUMENTS)
        assert constants(script)["ARGUMENTS"]["max_steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_the_same(folder: Path, processes: int) -> None:
    rows = token_rows(12)
    model = loaded(folder, init_lora_weights=False)
    files = export_script(model, folder / "train.py", rows, **ARGUMENTS)
    # --multi_gpu is what it adds where it sees several; "--cpu --num_processes 2" would start one, or ask for mpirun.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(files.script)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sql finished · 3 steps") == 1, done.stdout
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, folder / "train_output" / "sql", adapter_name="sql")
    assert trained.peft_config["sql"].r == 4
    assert any(bool(part.any()) for name, part in trained.named_parameters() if "lora_B" in name)
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    transformers.set_seed(ARGUMENTS["seed"])
    here = get_peft_model(base, LoraConfig(**constants(files.script)["CONFIG"]), adapter_name="sql")
    whole = {"per_device_train_batch_size": ARGUMENTS["per_device_train_batch_size"] * processes}
    train(here.train(), rows, **ARGUMENTS | whole)  # launch/test_launch: what the notebook's two processes learn, too
    expected = {name: part for name, part in here.named_parameters() if "lora" in name}
    assert all(is_close(part, trained.get_parameter(name)) for name, part in expected.items())


KILLED = """
import os, runpy, signal, sys
import nbpeft.training

on_step_end = nbpeft.training.RunCallback.on_step_end

def kill(self, args, state, control, **kwargs):
    on_step_end(self, args, state, control, **kwargs)
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

nbpeft.training.RunCallback.on_step_end = kill
from nbpeft.training.monitor import run_checkpointer
run_checkpointer._pause_after = lambda seconds: 0.0
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_a_script_that_was_killed_continues_when_it_is_started_again(folder: Path) -> None:
    rows, arguments = token_rows(12), ARGUMENTS | {"max_steps": 5}
    script = export_script(loaded(folder), folder / "train.py", rows, **arguments).script
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> Any:
        options: dict[str, Any] = {"env": environment, "cwd": folder, "capture_output": True, "text": True}
        return subprocess.run([sys.executable, *command, str(script)], timeout=300, **options)

    assert run("-c", KILLED).returncode == -9
    kept = max(int(path.name.partition("-")[2]) for path in (folder / "train_runs" / "sql-1").glob("checkpoint-*"))
    assert kept == 2
    again = run()
    assert again.returncode == 0 and "sql finished" in again.stdout, again.stderr[-3000:]
    facts = json.loads((folder / "train_runs" / "sql-1" / "run.json").read_text())
    assert (facts["status"], facts["step"], facts["resumed"]) == ("finished", 5, [kept])
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    transformers.set_seed(ARGUMENTS["seed"])
    whole = get_peft_model(base, LoraConfig(**constants(script)["CONFIG"]), adapter_name="sql")
    train(whole.train(), rows, **arguments)
    found = load_file(folder / "train_output" / "sql" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(whole, adapter_name="sql")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], part) for name, part in expected.items())


RUN = """
import json, runpy, sys
losses = [runpy.run_path(script)["main"]().state.history for script in sys.argv[1:]]
print("LOSSES", json.dumps(losses))
"""


@pytest.mark.slow
def test_fresh_processes_have_the_losses_of_the_cells(folder: Path) -> None:
    tokenizer = saved_tokenizer(folder / "base")
    text = [{"text": "a b c d e " * (1 + number % 3)} for number in range(8)]
    cases: list[tuple[Any, bool, dict[str, Any]]] = [
        (text, False, {}),
        (CHATS, False, {"packing": True, "max_length": 24}),
        (CHATS, True, {"gradient_checkpointing": True}),
    ]
    scripts, expected = [], []
    for number, (rows, quantized, more) in enumerate(cases):
        base: Any = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        if quantized:
            base = prepare_model_for_kbit_training(quantize_model(base))
        transformers.set_seed(ARGUMENTS["seed"])
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1), adapter_name="sql")
        given = ARGUMENTS | more
        result = train(model.train(), rows, tokenizer=tokenizer, **given)
        expected.append([list(point) for point in result.state.history])
        scripts.append(export_script(model, folder / f"train{number}.py", rows, tokenizer=tokenizer, **given).script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, scripts)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("LOSSES")[2])
    for losses, wanted in zip(found, expected, strict=True):
        assert len(wanted) == 3
        assert_close(torch.tensor(losses), torch.tensor(wanted))


def test_targets_are_condensed_only_if_they_are_whole_paths_of_an_adapted_model() -> None:
    model = trainable(llama(), "sql")
    config, paths = model.peft_config["sql"], model.manager.plan(model.peft_config["sql"]).paths
    assert short_targets(model, config.copy(target_modules=set(paths))) == set(paths)
    everything = config.copy(target_modules="all-linear")
    assert short_targets(model, config.copy(target_modules=set(model.manager.plan(everything).paths))) == "all-linear"
    assert short_targets(model, config.copy(target_modules=r".*_proj")) == r".*_proj"
    assert short_targets(model, config.copy(target_modules={"missing"})) == {"missing"}
    assert short_targets(llama(), config.copy(target_modules=set(paths))) == set(paths)
    assert short_targets(model, nbpeft.PromptTuningConfig(num_virtual_tokens=2)) is None


def test_a_training_on_preferences_is_exported_with_its_objective(folder: Path) -> None:
    rows = [{"prompt": "ab ", "chosen": "c", "rejected": "d"}] * 4
    given = {"tokenizer": CharTokenizer(), "objective": "dpo", "beta": 0.3, **ARGUMENTS}
    files = export_script(loaded(folder), folder / "train.py", rows, reference="base", **given)
    found = constants(files.script)
    assert {name: found["ARGUMENTS"][name] for name in ("objective", "reference", "beta")} == {
        "objective": "dpo",
        "reference": "base",
        "beta": 0.3,
    }
    model, written = loaded(folder), [json.loads(line) for line in files.data[0].read_text().splitlines()]
    result = train(model, written, **found["ARGUMENTS"] | {"output_dir": str(folder / "out")})
    assert (result.objective, result.reference, result.steps) == ("dpo", "base", 3)
    with pytest.raises(ConfigError, match="a script trains a new adapter without 'other': set reference='base'"):
        other = loaded(folder)
        other.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        export_script(other, folder / "other.py", rows, reference="other", **given)


def test_the_options_of_rows_are_exported_with_the_column_of_their_groups(folder: Path) -> None:
    rows = [{"text": f"text {number}" * 3, "user": number % 3, "other": 1} for number in range(6)]
    given = {"tokenizer": CharTokenizer(), "max_length": 8, "long": "drop", "eval_by": "user", **ARGUMENTS}
    with pytest.raises(TrainingError, match="None of the 6 rows has anything to learn within 8 tokens"):
        export_script(loaded(folder), folder / "train.py", rows, 0.4, **given)
    files = export_script(loaded(folder), folder / "train.py", rows, 0.4, **given | {"max_length": 99})
    found = constants(files.script)  # with the characters as tokens, which no script can load
    assert not {"long", "eval_by"} & found["ARGUMENTS"].keys() and len(files.data) == 2
    chats = [{**row, "user": number % 3, "other": 1} for number, row in enumerate(CHATS)]
    how = {"learn": "last", "reasoning": "drop", "long": "drop", "eval_by": "user"}
    options = {**given, **how, "tokenizer": saved_tokenizer(folder / "base"), "max_length": 99}
    files = export_script(loaded(folder), folder / "chats.py", chats, 0.4, **options)
    assert how.items() <= constants(files.script)["ARGUMENTS"].items()
    written = [json.loads(line) for line in files.data[0].read_text().splitlines()]
    assert [row.keys() for row in written] == [{"messages", "user"}] * 6


def test_completions_that_are_good_or_bad_are_exported_with_the_meaning_of_their_labels(folder: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a b", "completion": "c", "label": number % 2} for number in range(4)])
    rows = rows.cast_column("label", ClassLabel(names=["good", "bad"]))
    given = {"tokenizer": saved_tokenizer(folder / "base"), **ARGUMENTS}
    files = export_script(loaded(folder), folder / "train.py", rows, **given)
    written = [json.loads(line) for line in files.data[0].read_text().splitlines()]
    assert [row["label"] for row in written] == ["good", "bad", "good", "bad"]
    assert train(loaded(folder), written, **given).objective == "kto"
    with pytest.raises(TrainingError, match="the rows of kto cannot be given as tokens"):
        export_script(loaded(folder), folder / "other.py", rows, **given | {"tokenizer": CharTokenizer()})
    assert not (folder / "other.py").exists()


def test_tags_that_a_dataset_numbers_are_exported_by_their_names() -> None:
    names = ["O", "B-PER", "I-PER"]  # in another order than the model's
    kinds = {"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))}
    data = Dataset.from_list([{"tokens": ["ab", "c"], "tags": [1, -100]}], features=Features(kinds))
    written = text_rows(reading(data, TAGGER_TOKENIZER, inputs=model_inputs(tagger())))
    assert json.loads(written) == {"tokens": ["ab", "c"], "tags": ["B-PER", -100]}
