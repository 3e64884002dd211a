"""The context of a subcommand: the notebook's variables, the session, and how to show panels."""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nbpeft._util.mixtures import mixture
from nbpeft.confidential import masked, without_secrets
from nbpeft.errors import CellError, did_you_mean, near, with_article
from nbpeft.magics.body import evaluate_expression, expression_of, look_up, parse_body
from nbpeft.magics.parse import Expression, is_mixture, parts_of, rows_by_adapter
from nbpeft.magics.tokenize import reference
from nbpeft.session import Session
from nbpeft.session.handles import is_handle, is_module
from nbpeft.session.results.base import ModelResult

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_FILE = re.compile(rf"(?i)([^\[\]()]+)\.({'|'.join(suffix[1:] for suffix in DATA_SUFFIXES)})(?:\[[^\]]*\])?")
_OTHER_FILE = re.compile(r"[^\W\d][\w-]*\.[A-Za-z]\w{0,6}")
"""The name of a file with another suffix, or an attribute of a variable."""
_HUB_NAME = re.compile(r"([\w.-]+)/([\w.-]+)(?::[\w.-]+){0,2}(?:\[[^\]]*\])?")
"""``user/name:config:split[:1000]``."""
_SLICE = re.compile(r"([^\W\d]\w*)\[((?:-?\d{1,9})?):((?:-?\d{1,9})?)\]")
_NUMBER = re.compile(r"\d{1,9}|\d?\.\d{1,9}")
_TOKENIZER_NAMES = ("tokenizer", "tok", "processor")


@dataclass(frozen=True)
class TrainingCell:
    """The text of a training cell, stored without the objects of the notebook.

    Attributes:
        data: expression, file or dataset of the training rows.
        eval_data: the same for the evaluation rows, or how many training rows to hold out.
        tokenizer: expression of the tokenizer, if one was given.
        arguments: fields whose values can be written into a script.
        left_out: the names of the other fields.
        notes: what a script does not do as the cell did.
    """

    data: str
    eval_data: str | None
    tokenizer: str | None
    arguments: dict[str, Any] = field(repr=False)  # a token may be among them
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass
class NotebookContext:
    """The notebook as subcommands see it.

    Attributes:
        namespace: variables of the notebook.
        session: runs the commands.
        ui: how panels are shown: ``auto``, ``widgets``, ``html`` or ``text``.
        shell: the IPython shell, or None outside one.
        trained: model variable -> the last cell that trained it.
        line: text of the magic's line.
        cell: text of the cell's body; None for a line magic.
        silent: whether the result is hidden, because the line ends with a semicolon.
    """

    namespace: MutableMapping[str, Any]
    session: Session
    ui: Literal["auto", "widgets", "html", "text"] = "auto"
    shell: Any = None
    trained: dict[str, TrainingCell] = field(default_factory=dict)
    line: str = ""
    cell: str | None = None
    silent: bool = False

    def source(
        self, fields: Mapping[str, Any], rows: Mapping[str, str | None], functions: Mapping[str, Sequence[str] | None]
    ) -> dict[str, str]:
        """The text of the magic, to show or run it later, without fields that contain a token or password.

        Args:
            fields: the fields of the magic, evaluated.
            rows: options of the line about the rows -> their text. Texts that ``by_name`` accepts are included.
            functions: options with functions -> their words. Those are included for which ``own_functions`` finds all.

        Returns:
            ``line``, ``cell`` and those options -> text.
        """
        secret = {name.partition(".")[0] for name in without_secrets(fields)[1]}
        shown = [item for item in parse_body(self.cell or "") if item.name not in secret]
        words = "|".join(map(re.escape, secret)) or r"(?!)"
        return {
            "line": masked(re.sub(rf"(?<!\S)(?:{words})=\S*", "", self.line)).strip(),
            "cell": "\n".join(masked(f"{item.name} = {ast.unparse(item.value)}") for item in shown),
            **{option: text for option, text in rows.items() if text is not None and self.by_name(text) is not None},
            **{option: " ".join(words) for option, words in functions.items() if words and self.own_functions(words)},
        }

    def adapter_names(self) -> list[str]:
        """Names of the adapters of the notebook's models."""
        return [adapter.name for model in self.session.state.models for adapter in model.adapters]

    def model_names(self) -> list[str]:
        """Names of variables whose value is a torch module, adapted models first. Imports nothing."""
        known = [name for name in self.session.choices if name in self.namespace]
        return known + [
            name
            for name, value in list(self.namespace.items())
            if not name.startswith("_") and is_module(value) and name not in known
        ]

    def module(self, name: str, *, base: str = "user/name") -> Any:
        """Return the model in a variable, bare or adapted.

        Args:
            name: the variable.
            base: Hub id or folder of the model, for the message that no model was loaded yet.

        Raises:
            CellError: the variable is not defined, or is not a model; names variables that are.
        """
        text = reference(name) or name
        if text not in self.namespace and text in self.session.names:  # no variable holds it any more
            return self.session.model(text)
        if text not in self.namespace:
            raise CellError(f"no variable is called {text!r:.60}.{self._models_instead(text, base)}")
        value = self.namespace[text]
        if not is_module(value):
            raise CellError(f"{text!r:.60} is {with_article(value)}, not a model.{self._models_instead(text)}")
        return value

    def only_model(self, what: str) -> str:
        """Return the only variable whose value is a model.

        Raises:
            CellError: there is no model, or more than one.
        """
        names = self.model_names()
        if len(names) == 1:
            return names[0]
        if not names:
            raise CellError(f"{what} needs a model, and no variable holds one")
        raise CellError(f"{what}: say which model: {', '.join(names)}")

    def adapted_model(self, name: str | None, command: str) -> str:
        """Return the session's name of the adapted model in a variable.

        Args:
            name: a variable, or a name of a model in the session; None for the only model.
            command: the part of the line before the model, e.g. ``%lora plan``.

        Raises:
            CellError: no name is given and there are several models, or no model has that name.
            AdapterError: the model has no adapters.
        """
        model, names = self.chosen(name), self.session.choices
        if model is None and len(names) > 1:
            raise which_model(names, command)
        chosen = model if is_module(model) else self.session.model(model, command=command)
        return self.session.register(chosen, name=name)

    def chosen(self, name: str | None) -> Any:
        """Return the model of a command as the session takes it.

        The current value of a variable has precedence over a model of that name in the session.

        Args:
            name: a variable, or a name of a model in the session; None for the only model.

        Returns:
            A module, a name in the session, or None for the only model.

        Raises:
            CellError: no model has that name.
        """
        return name if name is None or name in self.session.past_names else self.module(name)

    def bind(self, variable: str | None, result: ModelResult) -> None:
        """Assign the model of a result to a variable whose value is a model, and release it from the result.

        Args:
            variable: the variable; nothing is assigned if it is None or its value is not a model.
            result: a result; afterwards it no longer references the model.
        """
        if variable is not None and is_module(self.namespace.get(variable)):
            self.namespace[variable] = result.model
        result.release()

    def replace(self, old: object, new: object) -> None:
        """Assign an object to every variable whose value is another object.

        Args:
            old: the current value.
            new: the new value.
        """
        names = [name for name, value in self.namespace.items() if value is old and not name.startswith("_")]
        for name in names:
            self.namespace[name] = new

    def value(self, text: str, option: str) -> Any:
        """Return the value of a variable or expression given to an option.

        Args:
            text: the variable or expression, e.g. ``train_ds`` or ``ds["train"]``.
            option: the option, for the message.

        Raises:
            CellError: it is not defined or cannot be evaluated.
        """
        name = reference(text) or text
        if name.isidentifier():
            return look_up(name, self.namespace)
        return evaluate_expression(expression_of(text, option), dict(self.namespace))

    def function(self, text: str, option: str) -> Any:
        """Return the value of a variable or expression given to an option that takes functions, also Python's own.

        Raises:
            CellError: it is not defined or cannot be evaluated.
        """
        own = getattr(builtins, text, None) if text not in self.namespace else None
        return own if callable(own) else self.value(text, option)

    def own_functions(self, names: Sequence[str]) -> list[Any]:
        """Return the functions with these names, from an untrusted source; empty unless cells define all of them."""
        found = [self.namespace.get(name) for name in names]
        own = self.namespace.get("__name__", "__main__")
        return found if all(inspect.isfunction(one) and one.__module__ == own for one in found) else []

    def prompt(self, text: str | None, what: str = "the prompt") -> Any:
        """Return a prompt: a text, or the value of an expression: a text, a conversation or a list of them.

        Args:
            text: the text of an option, parsed by ``prompt_text``; None if there is none.
            what: the option, for the message.

        Raises:
            CellError: the value is something else, or the expression cannot be evaluated.
        """
        if not isinstance(text, Expression):
            return text
        value = self.value(text, what)
        if isinstance(value, str | list | tuple):
            return value
        raise CellError(
            f"{what}: {text!r:.60} is {with_article(value)}, neither a text nor a conversation; as a text it is quoted"
        )

    def by_name(self, text: object) -> Any:
        """Return what a text from an untrusted source names, e.g. one stored in a run folder.

        The text is never evaluated: it may name a variable, a slice of a list, an existing file with rows, or a number.

        Returns:
            The variable's value, the slice, the file's path or the number; None for anything else.
        """
        if not isinstance(text, str):
            return None
        if is_mixture(text):
            parts = {part: (self.by_name(part), weight) for part, weight in parts_of(text)}
            return None if any(data is None for data, _ in parts.values()) else mixture(**parts)
        if of_adapters := rows_by_adapter(text):
            found = {adapter: self.by_name(part) for adapter, part in of_adapters.items()}
            return None if any(data is None for data in found.values()) else found
        name = reference(text) or text
        if name.isidentifier():
            return None if name.startswith("_") else self.namespace.get(name)
        if part := _SLICE.fullmatch(text):
            rows, ends = self.by_name(part[1]), (int(end) if end else None for end in part.groups()[1:])
            return rows[slice(*ends)] if isinstance(rows, list | tuple) else None
        if _NUMBER.fullmatch(text):
            return float(text) if "." in text else int(text)
        file = _FILE.fullmatch(text)
        return text if file and os.path.isfile(f"{file[1]}.{file[2]}") else None

    def data(self, text: str, option: str) -> Any:
        """Return what an option for rows names: a variable or expression, a file, or a dataset on the Hub.

        Args:
            text: the text of the option.
            option: the option, for the message.

        Returns:
            The value of a variable or expression; the text itself for a file or a dataset; a mixture of them for
            ``a*0.7 b*0.3``; the rows of each adapter for ``a=rows_a b=rows_b``.

        Raises:
            CellError: it is a variable that is not defined, or an expression that cannot be evaluated; or a part of a
                mixture is given twice.
        """
        namespace = self.namespace
        if not os.path.exists(text) and (of_adapters := rows_by_adapter(text)):
            self._refuse_missing_file(of_adapters, option)
            return {name: self.data(part, option) for name, part in of_adapters.items()}
        if is_mixture(text):
            parts = parts_of(text)
            names = [part for part, _ in parts]
            if twice := [part for part in names if names.count(part) > 1]:
                raise CellError(f"{option}: {twice[0]!r:.60} is in the mixture twice: give it one share")
            return mixture(**{part: (self.data(part, option), weight) for part, weight in parts})
        if (match := _FILE.fullmatch(text)) and not hasattr(namespace.get(match[1]), match[2]):
            return text
        if (match := _HUB_NAME.fullmatch(text)) and not (match[1] in namespace and match[2] in namespace):
            return text
        if text.startswith(("./", "../", "/", "~")) or (text not in namespace and os.path.exists(text)):
            return text
        if _OTHER_FILE.fullmatch(text) and text.partition(".")[0] not in namespace:
            files = [name for name in os.listdir() if name.lower().endswith(DATA_SUFFIXES)]
            hint = did_you_mean(text, files) or f" Files with rows end with {', '.join(DATA_SUFFIXES)}."
            raise CellError(
                f"{option}: there is no file {text!r:.100}, and no variable {text.partition('.')[0]!r:.60}.{hint}"
            )
        return self.value(text, option)

    def _refuse_missing_file(self, of_adapters: Mapping[str, str], option: str) -> None:
        """Refuses ``year=2024/x.jsonl``, the path of no file, which looks like the rows of an adapter ``year``."""
        name, path = next(iter(of_adapters.items()))
        if _FILE.fullmatch(path) and not os.path.exists(path) and not {*of_adapters} & {*self.adapter_names()}:
            whole = f"{name}={path}"
            raise CellError(
                f"{option}: there is no file {whole!r:.100}, and none {path!r:.100} for an adapter {name!r:.60}"
            )

    def tokenizer(self, name: str | None = None) -> Any:
        """Return the tokenizer in a variable; None if there is none. Imports nothing.

        Args:
            name: a variable or an expression; by default a variable named ``tokenizer``, ``tok`` or ``processor``, or
                else the only tokenizer in the notebook.

        Raises:
            CellError: the variable is not defined, or is not a tokenizer.
        """
        if name is not None:
            tokenizer = self.value(name, "--tokenizer")
            if not _is_tokenizer(tokenizer):
                tokenizers = [key for key, value in self.namespace.items() if key[:1] != "_" and _is_tokenizer(value)]
                instead = f" Tokenizers here: {', '.join(tokenizers)}." if tokenizers else ""
                what = (
                    "an adapted model"
                    if is_handle(tokenizer)
                    else "a model"
                    if is_module(tokenizer)
                    else with_article(tokenizer)
                )
                raise CellError(f"--tokenizer: {name!r:.60} does not hold a tokenizer, but {what}.{instead}")
            return tokenizer
        for usual in _TOKENIZER_NAMES:
            if _is_tokenizer(tokenizer := self.namespace.get(usual)):
                return tokenizer
        module = sys.modules.get("transformers.tokenization_utils_base")
        kind = getattr(module, "PreTrainedTokenizerBase", ())
        items = list(self.namespace.items())
        others = {id(value): value for key, value in items if not key.startswith("_") and isinstance(value, kind)}
        return next(iter(others.values())) if len(others) == 1 else None

    def forget(self, thing: object) -> None:
        """Remove an object and stored tracebacks from IPython's output history, so that they can be freed."""
        for name, value in list(self.namespace.items()):
            if value is thing and name.startswith("_"):
                self.namespace[name] = None
        history = self.namespace.get("Out")
        if isinstance(history, dict):
            for number in [number for number, value in history.items() if value is thing]:
                del history[number]
        displayhook = getattr(self.shell, "displayhook", None)
        for attribute in ("_", "__", "___"):
            if getattr(displayhook, attribute, None) is thing:
                setattr(displayhook, attribute, None)
        forget_tracebacks(self.shell)

    def _models_instead(self, name: str, base: str = "user/name") -> str:
        models = self.model_names()
        similar = near(name, models)
        if similar:
            return f" Did you mean {' or '.join(map(repr, similar))}?"
        if models:
            return f" Models here: {', '.join(models)}."
        variable = name if name.isidentifier() else "model"
        load = f'{variable} = AutoModelForCausalLM.from_pretrained("{base:.200}")'
        return f" No variable holds a model yet. Load one: {load}"


def which_model(names: Sequence[str], command: str) -> CellError:
    """The error of a command without a model, if there are several."""
    return CellError(f"several models: say which one, as in {' or '.join(f'{command} {name}' for name in names)}")


def _is_tokenizer(value: object) -> bool:
    return callable(value) and hasattr(value, "decode") and not is_module(value) and not isinstance(value, type)


def forget_tracebacks(shell: Any) -> None:
    """Drop the last traceback, whose frames may reference tensors."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    for name in ("InteractiveTB", "SyntaxTB"):
        handler: Any = getattr(shell, name, None)
        if getattr(handler, "tb", None) is not None:
            handler.tb = None
