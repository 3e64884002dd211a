"""Loading and unloading the extension, its configuration, and completion through the shell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from IPython.core import completer
from IPython.core.interactiveshell import InteractiveShell

from nbpeft.magics import help as help_texts
from nbpeft.magics.complete import CompletionSources, complete_line
from nbpeft.magics.lora import SUBCOMMANDS
from nbpeft.magics.matcher import IDENTIFIER
from nbpeft.session import get_session
from tests.magics.notebook import Notebook

HOOKS = ("%lora", "%%lora", "%lora_train", "%%lora_train", "%qlora", "%%qlora")
TRACES = 12 if hasattr(completer, "context_matcher") else 17
"""How many traces the extension leaves: for IPython 7, a hook for each of ``HOOKS`` instead of one matcher."""


def traces(shell: InteractiveShell) -> list[str]:
    """Everything of the extension that a shell still knows."""
    magics = [name for kind in shell.magics_manager.magics.values() for name in kind if "lora" in name]
    matchers = [getattr(item, "matcher_identifier", "") for item in shell.Completer.custom_matchers]
    hooks = shell.strdispatchers.get("complete_command")
    return [
        *magics,
        *(name for name in shell.magics_manager.registry if "Nbpeft" in name),
        *(type(item).__name__ for item in shell.configurables if "Nbpeft" in type(item).__name__),
        *(name for name in matchers if name == IDENTIFIER),
        *(type(item).__name__ for item in shell.ast_transformers if type(item).__module__.startswith("nbpeft.")),
        *(key for key in HOOKS if hooks is not None and key in hooks.strs),
        *(
            item.__qualname__
            for callbacks in shell.events.callbacks.values()
            for item in callbacks
            if (getattr(item, "__module__", None) or "").startswith("nbpeft.")
        ),
    ]


def test_unloading_leaves_nothing_behind(bare: Notebook) -> None:
    before = get_session()
    watchers = before.context.run_subscribers
    assert len(traces(bare.shell)) == TRACES
    bare.do("%unload_ext nbpeft")
    assert traces(bare.shell) == []
    assert watchers._references == []
    assert get_session() is not before


def test_loading_twice_is_loading_once(bare: Notebook) -> None:
    once = traces(bare.shell)
    bare.do("%load_ext nbpeft")
    assert traces(bare.shell) == once
    bare.do("%reload_ext nbpeft")
    assert traces(bare.shell) == once


def test_adapters_survive_a_reload(adapted: Notebook) -> None:
    adapted.do("%reload_ext nbpeft")
    assert "sql" in str(adapted.do("%lora"))
    adapted.do("%lora use chat")
    assert adapted["model"].active_adapters == ["chat"]


def test_the_display_can_be_configured(bare: Notebook) -> None:
    bare.do("%config NbpeftMagics.ui = 'html'")
    assert bare.shell.magics_manager.registry["NbpeftMagics"].ui == "html"


def test_a_bad_configuration_does_not_take_the_magics_away() -> None:
    notebook = Notebook(NbpeftMagics={"ui": "hologram"})
    try:
        assert "no adapted model yet" in str(notebook.do("%lora"))
        assert notebook.shell.magics_manager.registry["NbpeftMagics"].ui == "auto"
        assert len(traces(notebook.shell)) == TRACES
    finally:
        notebook.close()


@pytest.mark.parametrize(("magic", "option"), [("%lora?", "--dry-run"), ("%%lora_train?", "--data")])
def test_help_is_the_docstring(bare: Notebook, magic: str, option: str) -> None:
    text = bare.run(magic).printed
    assert "Example" in text and "usage:" not in text
    assert option in text


@pytest.mark.parametrize("line", ["%lora help", "%lora --help", "%lora -h", "%lora ?"])
def test_help_by_its_name(bare: Notebook, line: str) -> None:
    text = repr(bare.do(line))
    assert re.search(r"%%lora_train model --data .*\n.*num_train_epochs = 1\n +Train the active adapters", text)
    assert re.search(r"%lora combine .*--name both\n? +Combine adapters into [^.]*\s+error\.\n", text)
    assert max(len(part) for part in text.split("\n") if part.startswith(" " * 8)) <= 88
    assert "%%qlora" in text
    assert repr(bare.do(f"{line} use")).startswith("%lora use\nActivate one adapter")
    assert "Example" in repr(bare.do(f"{line} lora_train")) and "--data" in repr(bare.do(f"{line} %%lora_train"))
    assert repr(bare.do(f"{line} train")) == repr(bare.do(f"{line} lora_train"))
    assert "<table" in bare.do(line)._repr_html_()


def test_what_ipython_puts_there_is_not_proposed(bare: Notebook) -> None:
    assert bare.run("%lora load {opn}").line == "name 'opn' is not defined."


def test_braces_and_quotes_reach_the_parser(notebook: Notebook) -> None:
    notebook.do(r"%lora add model --name 'my adapter' target_modules=.*\.self_attn\.(q|v)_pro{1}j")
    config = notebook["model"].peft_config["my adapter"]
    assert config.target_modules == r".*\.self_attn\.(q|v)_pro{1}j"


def test_a_variable_as_a_whole_argument(notebook: Notebook) -> None:
    notebook["who"] = "sql"
    notebook.do("%lora add model --name {who} target_modules=q_proj")
    assert list(notebook["model"].peft_config) == ["sql"]
    assert "name 'nobody' is not defined" in notebook.run("%lora use {nobody}").line


class TestCompletion:
    def test_verbs_come_first_and_alone(self, bare: Notebook) -> None:
        assert sorted(bare.complete("%lora un")) == ["undo", "unload", "unmerge"]

    def test_adapters(self, adapted: Notebook) -> None:
        assert adapted.complete("%lora use ") == ["base", "chat", "sql"]
        assert adapted.complete("x = 1\n%lora use s") == ["sql"]

    def test_models(self, adapted: Notebook) -> None:
        adapted["mode"] = "not a model"
        assert adapted.complete("%%lora mo") == ["model"]

    def test_fields_in_the_body(self, adapted: Notebook) -> None:
        assert adapted.complete("%%lora model\nlora_a") == ["lora_alpha = "]
        assert "r = " in adapted.complete("%%lora model\n")

    def test_python_in_the_body(self, adapted: Notebook) -> None:
        adapted["my_rank_of_choice"] = 4
        assert "my_rank_of_choice" in adapted.complete("%%lora model\nr = my_ran")

    def test_training_arguments(self, adapted: Notebook) -> None:
        adapted.do("from transformers import TrainingArguments")
        assert "num_train_epochs = " in adapted.complete("%%lora_train model --data d\nnum_tr")

    def test_paths(self, adapted: Notebook, tmp_path: Path) -> None:
        (tmp_path / "adapters").mkdir()
        assert adapted.complete(f"%lora load {tmp_path}/ad") == [f"{tmp_path}/adapters/"]

    def test_the_old_hook(self, adapted: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
        """What IPython 7 has: no matchers of the second kind."""
        adapted.do("%unload_ext nbpeft")
        monkeypatch.setattr("nbpeft.magics.matcher._matcher", lambda completion: None)
        adapted.do("%load_ext nbpeft")
        _, matches = adapted.shell.complete("c", "%lora use c", 11)
        assert matches == ["chat"]
        adapted.do("%unload_ext nbpeft")
        assert traces(adapted.shell) == []


def test_the_page_for_programs_is_printed(bare: Notebook) -> None:
    page = (Path(__file__).parents[2] / "notebooks" / "guide" / "AGENTS.md").read_text(encoding="utf-8")
    assert str(bare.do("%lora help --agent")) == page.strip()
    assert "--agent" in str(bare.do("%lora help"))
    assert complete_line("help -", SUBCOMMANDS, CompletionSources()).words == ("--agent",)


def test_a_package_without_the_page_says_so(bare: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(help_texts, "_AGENTS", "NO-PAGE.md")
    assert "is neither in the installed package nor" in bare.run("%lora help --agent").line


def test_the_error_of_a_cell_is_in_the_state_of_the_session(bare: Notebook) -> None:
    line = bare.run("%lora use sql").line
    error = bare.session.last_error
    assert error is not None and error["code"] == "adapter"
    assert json.loads(bare.session.describe())["last_error"]["code"] == "adapter" and "%%lora MODEL" in line
