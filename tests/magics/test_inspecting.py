"""What a kernel answers to Shift+Tab in a cell of the magics."""

from __future__ import annotations

from typing import Any

import pytest

from nbpeft.magics import load, unload
from nbpeft.magics.help import command_help
from nbpeft.magics.lora import SUBCOMMANDS
from tests.magics.notebook import Notebook


class Kernel:
    """Answers as ipykernel's does, by name alone."""

    def do_inspect(self, code: str, cursor_pos: int, detail_level: int = 0, omit_sections: Any = ()) -> Any:
        return {"status": "ok", "found": False, "data": {}, "metadata": {}}


@pytest.fixture
def kernel(notebook: Notebook) -> Any:
    """A kernel around the shell, with the extension loaded once more."""
    notebook.shell.kernel = Kernel()
    load(notebook.shell)
    yield notebook.shell.kernel
    unload(notebook.shell)
    assert "do_inspect" not in vars(notebook.shell.kernel)
    del notebook.shell.kernel


def asked(kernel: Any, cell: str) -> str:
    """The tooltip at the bar in a cell; empty where there is none."""
    cursor = cell.index("|")
    reply = kernel.do_inspect(cell.replace("|", ""), cursor, 0, set())
    return str(reply["data"]["text/plain"]) if reply["found"] else ""


@pytest.mark.drawn(4)
@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("%%lora model\nlora_al|pha = 3", ["lora_alpha: float = 8", "lora_alpha / r"]),
        ("%%lora model\nr = 8\ninit_lora_weights = 'ol|", ["init_lora_weights: bool | str = True", "'olora'"]),
        ("%%lora model\ntarget_modules = [\n  'q_|", ["target_modules", "'all-linear'", "names of the model's layers"]),
        (
            "%%lora_train model --data x\nlearning_rate|",
            ["learning_rate: float", "By default it follows from method, model and objective"],
        ),
        ("%%lora_train model --data x\nlr_scheduler_type|", ["'cosine'", "'linear'"]),
        ("%%lora_train model --da|ta x", ["--data", "training rows"]),
        ("%%qlora x\nquant_type| = 'nf4'", ["quant_type: str = 'nf4'", "'fp4'"]),
        ("%lora add model r|=8", ["r: int = 8"]),
        ("x = 1\n%lora plan| model", [str(command_help(SUBCOMMANDS["plan"], "%lora plan"))]),
        ("%lora help us|e", ["%lora use\nActivate one adapter"]),
    ],
)
def test_a_field_a_verb_and_an_option(kernel: Any, cell: str, words: list[str]) -> None:
    found = asked(kernel, cell)
    assert all(word in found for word in words), found


@pytest.mark.parametrize("cell", ["prin|t", "%%time\nr| = 3", "%timeit| x", "%lora nonsense|", "%%lora model\nnone|"])
def test_everything_else_is_left_to_the_kernel(kernel: Any, cell: str) -> None:
    assert asked(kernel, cell) == ""
