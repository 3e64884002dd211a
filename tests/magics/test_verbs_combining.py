"""``%lora combine``, ``compare`` and ``swap`` in a real shell, and the mistakes people make with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.names import COMBINATION_TYPES
from nbpeft.session import get_session
from nbpeft.session.results.comparing import CompareResult
from nbpeft.widgets import AdaptersPanel, BlendPanel, ComparePanel
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close, differ
from tests.magics.notebook import Notebook
from tests.magics.test_verbs import train_a_little
from tests.tiny_models import logits
from tests.waiting import PATIENCE


@pytest.fixture
def trained(adapted: Notebook) -> Notebook:
    """Adapters ``chat`` (rank 2) and ``sql`` (rank 4, active), and a tokenizer."""
    train_a_little(adapted["model"])
    adapted["model"].eval()
    adapted["tok"] = CharTokenizer()
    return adapted


@pytest.fixture
def saved(trained: Notebook, tmp_path: Path) -> Path:
    """Another ``sql`` in a folder."""
    trained.do("%lora copy sql other")
    with torch.no_grad():
        for parameter in trained["model"].manager.parameters("other"):
            parameter.neg_()
            parameter[0] += 0.5
    trained.do(f"%lora save {tmp_path}/new --adapter other")
    trained.do("%lora delete other")
    trained.do("%lora use sql")
    return tmp_path / "new"


# Combine


def test_combine_makes_the_exact_sum(trained: Notebook) -> None:
    result = trained.do("%lora combine sql=0.7 chat=-0.3 --name both")
    assert str(result).startswith(
        "made 'both' = 0.7 × sql - 0.3 × chat on model: exact, rank 6, 4 layers, nothing lost"
    )
    trained.do("%lora scale sql 0.7")
    trained.do("%lora scale chat -0.3")
    trained.do("%lora use sql chat")
    expected = logits(trained["model"])
    trained.do("%lora use both")
    assert_close(logits(trained["model"]), expected)


def test_combine_takes_types_and_ranks(trained: Notebook) -> None:
    cut = trained.do("%lora combine sql chat --name cut --r 2")
    assert cut.weights == (("sql", 1.0), ("chat", 1.0)) and cut.rank == 2 and cut.relative_error > 0
    assert trained.do("%lora combine sql=1 chat=1 --name s --type svd").kind == "svd"
    assert trained.do("%lora combine sql=2 --name chat --replace").remade


def test_the_types_are_those_of_the_method(trained: Notebook) -> None:
    trained.do("%lora add model --name one --method ia3")
    trained.do("%lora copy one two")
    types = get_session().combination_types
    assert types(["one", "two"]) == ("exact", "linear")
    assert types([]) == types(["sql"]) == COMBINATION_TYPES
    assert "choose from exact, linear" in trained.run("%lora combine one two --name c --type ties").line
    made = trained.do("%lora combine one two --name c")
    assert made.rank is None and all(layer.rank is None for layer in made.layers)


@pytest.mark.drawn(10)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("combine sql=0.7", "%lora combine needs --name, e.g. %lora combine"),
        ("combine --name c", "NAME=WEIGHT"),
        ("combine sql=x --name c", "'sql=x' is not name=weight, e.g. sql=0.7"),
        ("combine =1 --name c", "'=1' is not name=weight"),
        ("combine sql=nan --name c", "not name=weight"),
        ("combine sql=1 sql=2 --name c", "'sql' is given twice"),
        ("combine sqll=1 --name c", "Did you mean 'sql'?"),
        ("combine sql=1 chat=1 --name c --type tie", "type 'tie' is unknown"),
        (
            "combine sql=1 chat=1 --name c --type ties",
            "type ties needs a density, which is set in Python: nbpeft.get_session().combine(",
        ),
        ("combine sql=1 chat=1 --name c --type linear", "needs equal ranks"),
        ("combine sql=1 --name c --r big", "--r: expected a whole number of at least 1, not 'big'"),
        ("combine sql=1 --name chat", "has an adapter 'chat' already"),
        ("compare", 'needs a prompt in quotes: %lora compare "…"'),
        ("compare Ana needs chairs", "unexpected argument 'needs'"),
        ('compare "Hi" --adapters sq', "Did you mean 'sql'?"),
        ('compare "Hi" --blend sql=', "'sql=' is not name=weight"),
        ('compare "Hi" --prompts tok', "needs a prompt"),
        ("compare --prompts model_", "model_"),
        ('compare "Hi" --max-new-tokens 0', "at least 1"),
        ('compare "Hi" --tokenizer model', "'model' does not hold a tokenizer"),
        ('compare "Hi" --token 3', "no option --token. Did you mean '--tokenizer'"),
        ("swap nowhere --into sql", "nowhere"),
        ("swap nowhere --into sq", "Did you mean 'sql'?"),
        ("swap nowhere --validate tok_", "tok_"),
        ("panel adaptrs", "Did you mean 'adapters'?"),
        ("panel blend --model nomodel", "no variable is called 'nomodel'"),
        ("panel blend nomodel", "unexpected argument 'nomodel'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(trained: Notebook, line: str, words: str) -> None:
    before = logits(trained["model"])
    outcome = trained.run(f"%lora {line}")
    assert words in outcome.line and "\n" not in outcome.line
    assert trained["model"].manager.names == ("chat", "sql")
    assert torch.equal(logits(trained["model"]), before)


# Compare


def test_compare_finds_the_tokenizer(trained: Notebook) -> None:
    result = trained.do('%lora compare "Ana needs 12 chairs" --max-new-tokens 4')
    assert isinstance(result, CompareResult)
    assert list(result.answers) == ["base", "chat", "sql"]
    assert result.prompts == ("Ana needs 12 chairs",)
    assert max(answer.token_count for column in result.columns for answer in column.answers) == 4
    direct = get_session().compare("Ana needs 12 chairs", max_new_tokens=4, tokenizer=CharTokenizer())
    assert direct.columns == result.columns


def test_compare_takes_columns_blends_and_several_prompts(trained: Notebook) -> None:
    trained["questions"] = ["Hi", "Who?"]
    blends = "--blend sql=0.5 chat=0.5 --blend chat=2"
    result = trained.do(f"%lora compare --prompts questions --adapters sql {blends} --no-base --max-new-tokens 2")
    assert list(result.answers) == ["sql", "sql + chat (0.5 / 0.5)", "chat (2)"]
    assert result.prompts == ("Hi", "Who?") and result.passes == 3
    assert trained["model"].manager.active == ("sql",)


def test_raw_leaves_the_template_aside(trained: Notebook) -> None:
    trained["tok"] = CharTokenizer("template")
    chat = trained.do('%lora compare "Hi" --max-new-tokens 6').answers
    raw = trained.do('%lora compare "Hi" --max-new-tokens 6 --no-chat').answers
    assert raw == get_session().compare("Hi", max_new_tokens=6, tokenizer=CharTokenizer()).answers
    assert raw != chat
    assert trained.do('%lora compare "Hi" --max-new-tokens 6 --chat').answers == chat
    assert "exclude each other" in trained.run('%lora compare "Hi" --no-chat --chat').line


def test_without_a_tokenizer_it_says_how_to_give_one(trained: Notebook) -> None:
    del trained.shell.user_ns["tok"]
    assert "--tokenizer" in trained.run('%lora compare "Hi"').line
    trained["mine"] = CharTokenizer()
    assert trained.do('%lora compare "Hi" --tokenizer mine --max-new-tokens 1').status == "finished"


# Swap


def test_swap_puts_another_in_place(trained: Notebook, saved: Path) -> None:
    model = trained["model"]
    before = logits(model)
    result = trained.do(f'%lora swap {saved} --into sql --check-prompt "Hi" --max-new-tokens 5')
    assert differ(logits(model), before)
    assert model.manager.names == ("chat", "sql")
    assert str(result).startswith(f"swapped 'sql' on model for {saved}: LoRA r=4")
    assert result.before != result.after


def test_swap_can_leave_the_template_aside(trained: Notebook, saved: Path) -> None:
    trained["tok"] = CharTokenizer("template")
    trained.do(f"%lora swap {saved} --into sql")
    chat = trained.do(f'%lora swap {saved} --into sql --check-prompt "Hi" --max-new-tokens 6').after
    raw = trained.do(f'%lora swap {saved} --into sql --check-prompt "Hi" --max-new-tokens 6 --no-chat').after
    wanted = get_session().compare("Hi", adapters=["sql"], max_new_tokens=6, tokenizer=CharTokenizer(), chat=False)
    assert (raw,) == wanted.answers["sql"]
    assert raw != chat


def test_swap_asks_the_function(trained: Notebook, saved: Path) -> None:
    before = logits(trained["model"])
    trained.do("def check(model):\n    return False")
    assert "did not pass" in trained.run(f"%lora swap {saved} --validate check").line
    assert torch.equal(logits(trained["model"]), before)
    trained["number"] = 3
    assert "'number' is not a function" in trained.run(f"%lora swap {saved} --validate number").line
    trained.do("def check(model):\n    return True")
    trained.do(f"%lora swap {saved} --validate check")
    assert differ(logits(trained["model"]), before)


def test_swap_keeps_what_is_compiled(trained: Notebook, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def hotswap(model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr("nbpeft.model.hotswap_adapter", hotswap)
    trained["fast"] = torch.compile(trained["model"], backend="eager")
    trained.run(f"%lora swap {saved} --into sql")
    assert seen == [trained["fast"]]
    del trained.shell.user_ns["fast"]
    trained.run(f"%lora swap {saved} --into sql")
    assert seen[1] is trained["model"]


# Panels


def test_panels_open_by_their_names(trained: Notebook) -> None:
    assert isinstance(trained.do("%lora panel"), AdaptersPanel)
    assert isinstance(trained.do("%lora panel adapters --model model"), AdaptersPanel)
    blend = trained.do("%lora panel blend")
    assert isinstance(blend, BlendPanel) and blend.model_name == "model"
    compare = trained.do('%lora compare "Hi" --panel --max-new-tokens 7')
    assert isinstance(compare, ComparePanel)
    assert trained.do("%lora compare --panel --model model").model_name == "model"
    for shown in (blend, compare):
        shown.close()


def test_a_panel_answers_with_the_tokenizer_of_the_notebook(trained: Notebook) -> None:
    del trained.shell.user_ns["tok"]
    panel = trained.do('%lora compare "Hi" --panel --max-new-tokens 3')
    try:
        panel._ui = "widgets"
        assert panel.widget is not None
        trained["tok"] = CharTokenizer()
        panel._command("run")
        assert panel.wait(PATIENCE)
        assert list(panel.result.answers) == ["base", "chat", "sql"]
    finally:
        panel.close()


# Help and completion


@pytest.mark.parametrize("verb", ["combine", "compare", "swap", "panel"])
def test_help(bare: Notebook, verb: str) -> None:
    text = str(bare.do(f"%lora {verb} --help"))
    assert text.startswith(f"%lora {verb}\n") and "Example\n" in text
    assert f"%lora {verb}" in str(bare.shell.find_line_magic("lora").__doc__)


def test_completion(trained: Notebook, tmp_path: Path) -> None:
    assert trained.complete("%lora comb") == ["combine"]
    assert trained.complete("%lora combine ") == ["chat=", "sql="]
    assert trained.complete("%lora combine sql=0.7 ") == ["chat="]
    assert trained.complete("%lora combine sql=0.7 --ty") == ["--type"]
    assert trained.complete("%lora combine sql=0.7 --type ti") == ["ties", "ties_svd"]
    assert trained.complete('%lora compare "Hi" --adapters ') == ["chat", "sql"]
    assert trained.complete('%lora compare "Hi" --adapters sql ') == ["chat"]
    assert trained.complete('%lora compare "Hi" --adapters sql --tok') == ["--tokenizer"]
    assert trained.complete('%lora compare "Hi" --blend sql=1 c') == ["chat="]
    assert trained.complete('%lora compare "Hi" --tokenizer t') == ["tok"]
    assert trained.complete("%lora swap x --into s") == ["sql"]
    (tmp_path / "orders_v2").mkdir()
    (tmp_path / "orders_v2/adapter_config.json").touch()
    assert trained.complete(f"%lora swap {tmp_path}/ord") == [f"{tmp_path}/orders_v2/"]
    assert trained.complete("%lora panel ") == ["adapters", "blend"]
    assert trained.complete("%lora panel blend --model m") == ["model"]


def test_the_longest_answer_is_called_as_generate_calls_it(trained: Notebook) -> None:
    result = trained.do('%lora compare "Hi" --max-new-tokens 3')
    assert max(answer.token_count for column in result.columns for answer in column.answers) == 3


# Delete


def test_several_are_deleted_at_once_or_none(trained: Notebook) -> None:
    trained.do("%lora copy sql other")
    refused = trained.run("%lora delete other nope").complained
    assert refused == "UsageError: Adapter 'nope' not found; the model has: 'chat', 'sql', 'other'.\n"
    assert trained["model"].manager.names == ("chat", "sql", "other")
    assert str(trained.do("%lora delete other sql").line) == "deleted 'other', 'sql'"
    assert trained["model"].manager.names == ("chat",)
