"""Lines and cells drawn from a grammar: each is carried out, or is one clear line and changes nothing.

What is drawn depends on a seed alone: a failure tells the lines that failed, in words that can be run again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from IPython.core.error import UsageError
from torch import Tensor

from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.parse import Argument, Subcommand
from tests.char_tokenizer import CharTokenizer
from tests.effort import effort
from tests.magics.notebook import Notebook, Outcome
from tests.tiny_models import llama

COUNT = effort(quick=125, full=1_000, long=20_000)
SEED = int(os.environ.get("NBPEFT_SEED", "7"))
LONGEST = 500
"""Characters of a message's first line."""


def words(text: str) -> list[str]:
    """Its words."""
    return text.split()


PLAIN = words("a b c default base model second nope")
HOSTILE = (
    *words(
        "'a' \"a a.b a/b ä 名 🙂 -x -- - '' a\\b __base__ training forward {a} $a {text} $text $number {model} $nope"
    ),
    *words(
        "a=1 a; ; it's ( [ { ) ] } \" ' a(1 a\" [[ '\" # % ! .. ~ * | && `ls` \\ \\n <b> {{a}} $ $$ ${a} a,b , = =="
    ),
    *("A B", "x" * 300, "\u202e", "\u00a0", "a\tb", "\x07"),
)
NUMBERS = (*words("1 2 0 -1 0.5 1e400 -1e400 nan inf 1e-3 10**3 x ² 1_0 0x10 True 1,5 ٣"), "", "9" * 30, "9" * 5000)
WEIGHTS = words("a=0.7 b=0.3 a b=-1 a=0 a=x =1 a=1e999 a=0.5=2 a=nan c=1 a=")
PATHS = (*words("$folder {folder} out ./out/deep nowhere no/where $text $nope/x ''"), "x" * 300, "a/" * 3000)
VARIABLES = (
    *words("rows rows[:2] rows[ rows[0] text tok number undefined None [] 'hi' ['hi','ho'] 1/0 rows[9] x=1 (yield)"),
    *("lambda m: True", "(lambda m: 1/0)", "await x", "[" * 300, "[" * 300 + "]" * 300),
)
VALUES = (
    *words(
        "1 2 4 0 -3 0.1 1.5 True False None 'x' '' [] {} () (1,) [1] [[1]] ['q_proj'] 'q_proj' 'all-linear' ['nope']"
    ),
    *words(
        "{'x':1} {'q_proj':2} {1:2} 5j b'x' 10**400 -10**400 float('nan') float('inf') 1e308 'a'*5000 ['a']*50 rows"
    ),
    *words("model undefined 1/0 print int ... 'a{99999999999}' '(' '[a' '*' '.*' {'a{99999999999}':2} {'(':2}"),
    *words("'\\x00' '\\ud800' ( ' 1, r (yield)"),
    *("9" * 5000, "(" * 300 + "1" + ")" * 300, "lambda: 0", "x for x in rows", "await rows"),
)
CONFIG_FIELDS = words(
    "r lora_alpha target_modules lora_dropout bias use_rslora use_dora rank_pattern alpha_pattern exclude_modules "
    "layers_to_transform layers_pattern modules_to_save task_type init_lora_weights fan_in_fan_out peft_type "
    "inference_mode trainable_token_indices revision rr lora_alph for ä"
)
TRAINING_FIELDS = words(
    "max_steps learning_rate num_train_epochs per_device_train_batch_size optim seed bf16 lr_scheduler_type "
    "warmup_steps output_dir torch_compile_mode dataloader_num_workers deepspeed resume_from_checkpoint "
    "trainer_class arguments_class neftune_noise_alpha callbacks report_to gradient_checkpointing "
    "gradient_checkpointing_kwargs label_names max_length data_collator save_strategy eval_strategy "
    "logging_steps compute_metrics optimizers adapter data epochs"
)
QUANTIZATION_FIELDS = words("bits quant_type double_quant compute_dtype upcast gguf_file model_class dtype")
FIELDS = {
    "config": CONFIG_FIELDS,
    "training": TRAINING_FIELDS,
    "qlora": (*QUANTIZATION_FIELDS, *CONFIG_FIELDS),
    "plan": (*QUANTIZATION_FIELDS, *CONFIG_FIELDS, *TRAINING_FIELDS),
}
NEEDED = {"config": "target_modules = ['q_proj']", "qlora": "target_modules = ['q_proj']", "training": "max_steps = 1"}
LINES = {"lora": "model --name c", "qlora": "second --name c", "lora_train": "model --data rows --adapter b"}
"""Lines of cells without a mistake."""
RIGHT = (
    "%lora add model --name nope r=2 target_modules=q_proj",
    "%lora load $folder --name nope --model model",
    "%lora delete b --model model",
    "%lora rename a nope --model model",
    "%lora copy a nope --model model",
    "%lora freeze a --model model",
    "%lora use b --model model",
    "%lora use base --model model",
    "%lora scale a 0.5 --model model",
    "%lora inspect a --model model",
    "%lora memory --model model",
    "%lora combine a=0.7 b=0.3 --name nope --model model",
    "%lora convert a --r 1 --name nope --model model",
    "%lora swap $folder --into b --model model",
    "%lora merge a --model model",
    "%lora unload --model model",
    "%lora ask 'hi' --max-new-tokens 1 -t tok --model model",
    "%%lora model --name nope\nr = 2\ntarget_modules = ['q_proj']",
)
"""Lines and cells without a mistake: as they are they are carried out, in whatever state."""
LINES_A_STATE = 25
"""Lines after which another number of models carries adapters."""
OTHER_LINES = ("import os", "f(1)", "r += 1", "r: int", "a.b = 1", "# r = 1", "  r = 1", ";", "}")
SLOW = ("plan", "doctor", "export", "compare", "--dry-run", "--check-prompt")
"""What takes a second or more when it is carried out; drawn less often."""


class Grammar:
    """Draws lines and cells."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def draw(self) -> str:
        """A line or a cell, now and then with characters that are missing, doubled or strange."""
        text = self._drawn()
        for _ in range(self._random.randint(1, 3) if self._one_in(6) else 0):
            at = self._random.randint(text.index(" ") + 1 if " " in text else len(text), len(text))
            kept = text[at + self._random.randint(0, 1) :]
            text = text[:at] + self._random.choice(("", "", text[at : at + 1], *"'\"()[]{}=-$; ,\\é")) + kept
        return text

    def _drawn(self) -> str:
        if self._one_in(6):
            return self._random.choice(RIGHT)
        if self._one_in(3):
            return self._cell(self._random.choice(list(CELLS.values())))
        if self._one_in(40):
            return "%lora " + " ".join(self._random.choices((*HOSTILE, *PLAIN), k=self._random.randint(0, 4)))
        verb = self._random.choice(list(SUBCOMMANDS.values()))
        if verb.name in SLOW and not self._one_in(8):
            return self._drawn()
        return f"%lora {verb.name} {self._line(verb)}"

    def _cell(self, verb: Subcommand) -> str:
        """A cell, half of the time with one field that may be wrong and nothing else."""
        single = self._one_in(2)
        line = LINES[verb.name] if single or (verb.name == "lora_train" and self._one_in(2)) else self._line(verb)
        fields = [self._random.choice(FIELDS[verb.fields]) for _ in range(1 if single else self._random.randint(0, 4))]
        lines = [f"{name} = {self._random.choice(VALUES)}" for name in fields]
        needed = NEEDED[verb.fields]
        if needed.split(" ")[0] not in fields and (single or not self._one_in(4)):
            lines.append(needed)
        if not single and self._one_in(8):
            lines.insert(0, self._random.choice(OTHER_LINES))
        return f"%%{verb.name} {line}\n" + "\n".join(lines)

    def _line(self, verb: Subcommand) -> str:
        found: list[str] = []
        for item in verb.arguments:
            if item.positional:
                found += [self._value(item) for _ in range(self._random.randint(1, 2) if item.many else 1)]
                if self._one_in(12):
                    found.pop()
            elif self._one_in(2 if item.options.get("required") or item.flags[0] == "--model" else 6):
                if item.flags[0] in SLOW and not self._one_in(8):
                    continue
                found.append(self._random.choice(item.flags))
                if item.takes_value and not self._one_in(15):
                    found.append(self._value(item))
        if verb.fields and self._one_in(2):
            for _ in range(self._random.randint(1, 3)):
                value = self._random.choice(VALUES).replace(" ", "")
                found.append(f"{self._random.choice(FIELDS[verb.fields])}={value}")
        if self._one_in(6):
            found.insert(self._random.randint(0, len(found)), self._random.choice(HOSTILE))
        return " ".join(found)

    def _value(self, item: Argument) -> str:
        if self._one_in(8):
            return self._random.choice(HOSTILE)
        if item.words and self._one_in(2):
            return self._random.choice(item.words)
        if item.completes in ("", "name") and item.options.get("type") is not None:
            return self._random.choice(NUMBERS)
        pools: dict[str, Sequence[str]] = {
            "adapter": ("a", "b", "a", "b", *PLAIN),
            "model": ("model", "model", "second", *PLAIN),
            "path": PATHS,
            "source": ("model", "second", *PATHS),
            "variable": VARIABLES,
            "weight": WEIGHTS,
        }
        return self._random.choice(pools.get(item.completes, (*PLAIN, *NUMBERS)))

    def _one_in(self, count: int) -> bool:
        return self._random.randrange(count) == 0


class SavedLetters(CharTokenizer):
    """A tokenizer that a Trainer can save."""

    def save_pretrained(self, folder: str) -> None: ...


class Bench:
    """A notebook whose variables hold two models, and what can be said of its state."""

    def __init__(self, notebook: Notebook, folder: Path) -> None:
        self.notebook, self.folder = notebook, folder
        self.set_up()

    def set_up(self, *, two: bool = False) -> None:
        """Everything as at the start; adapters on one model or on two."""
        space = self.notebook.shell.user_ns
        for name in [name for name in space if not name.startswith("_") and name not in self._kept]:
            del space[name]
        small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
        for name in ("model", "second"):
            self.notebook[name] = llama(**small)
        self.notebook["rows"] = [{"input_ids": [1, 2, 3, 4]}] * 4
        self.notebook["text"], self.notebook["number"] = "hello there", 3
        self.notebook["tok"] = SavedLetters()
        self.notebook["folder"] = str(self.folder)
        for name in ("a", "b"):
            self.notebook.do(f"%lora add model --name {name} r=2 target_modules=q_proj")
        if two:
            self.notebook.do("%lora add second --name c r=2 target_modules=q_proj")

    _kept = ("In", "Out", "exit", "quit", "get_ipython", "open")

    def state(self) -> list[Any]:
        """All that a command may change, comparable with ``same``."""
        space = self.notebook.shell.user_ns
        names = [name for name in space if not name.startswith("_") and name not in self._kept]
        bound = {name: id(space[name]) for name in names}
        found: list[Any] = [bound]
        for name in ("model", "second"):
            module = space.get(name)
            if not isinstance(module, torch.nn.Module):
                continue
            manager = getattr(module, "manager", None)
            if manager is not None:
                configs = {adapter: (id(config), config.to_dict()) for adapter, config in manager.configs.items()}
                scales = {adapter: manager.scale(adapter) for adapter in manager.names}
                found += [configs, scales, manager.active, manager.enabled, manager.merged, set(manager.frozen)]
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            found += [{key: (id(value), value.requires_grad) for key, value in tensors.items()}, module.training]
            found += [{key: value.detach().clone() for key, value in tensors.items()}]
        found.append({path: path.stat().st_size for path in self.folder.parent.rglob("*") if path.is_file()})
        return found


def same(before: Any, after: Any) -> bool:
    """Whether two states are equal, tensors bit by bit."""
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and before.dtype == after.dtype and bool(torch.equal(before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(value, after[key]) for key, value in before.items())
    if isinstance(before, list):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)


def wrong_with(outcome: Outcome, bench: Bench, before: list[Any]) -> str:
    """What a failed line did that it must not do, or the empty string."""
    error = outcome.error
    if type(error) is not UsageError:
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    first, *rest = str(error).split("\n")
    if not first.strip() or len(first) > LONGEST or len(rest) > 2 or any(len(line) > LONGEST for line in rest):
        return f"said {len(str(error))} characters in {len(rest) + 1} lines: {str(error)[:200]}"
    if "Traceback" in outcome.printed + outcome.complained:
        return "printed a traceback"
    after = bench.state()
    changed = [str(one)[:200] for one, other in zip(before, after, strict=False) if not same(one, other)]
    if changed or len(before) != len(after):
        return f"changed {changed} and then said: {first[:200]}"
    return ""


@pytest.fixture
def bench(bare: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)
    made = Bench(bare, tmp_path / "saved")
    made.notebook.do("%lora save $folder --adapter a --model model")
    made.set_up()
    yield made


@pytest.fixture
def bare() -> Iterator[Notebook]:
    notebook = Notebook()
    yield notebook
    notebook.close()


@pytest.mark.drawn(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("two", [False, True])
def test_a_line_without_a_mistake_is_carried_out(bench: Bench, two: bool) -> None:
    for line in RIGHT:
        bench.set_up(two=two)
        assert bench.notebook.run(line).error is None, line


@pytest.mark.filterwarnings("ignore")
def test_every_line_is_carried_out_or_refused_whole(bench: Bench) -> None:
    grammar, wrong, carried_out = Grammar(SEED), [], 0
    for number in range(COUNT):
        # What a line meets follows from its number alone, not from what became of others.
        two = number // LINES_A_STATE % 2 == 0
        if number % LINES_A_STATE == 0:
            bench.set_up(two=two)
            before = bench.state()
        line = grammar.draw()
        torch.manual_seed(number)
        outcome = bench.notebook.run(line)
        if outcome.error is None:
            carried_out += 1
            if not same(before, bench.state()):
                bench.set_up(two=two)
                before = bench.state()
            continue
        complaint = wrong_with(outcome, bench, before)
        if complaint:
            wrong.append(f"{number}: {line[:600]!r} {complaint}")
            bench.set_up(two=two)
            before = bench.state()
    assert not wrong, "\n".join([f"{len(wrong)} of {COUNT}", *wrong[:40]])
    assert COUNT / 20 < carried_out < COUNT * 0.6
