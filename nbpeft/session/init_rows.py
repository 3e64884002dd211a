"""Rows that an adapter starts from, for inits that need data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbpeft.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.session.context import SessionContext

ROWS = 256
"""How many rows are looked at, if nobody says: CorDA's and LoRA-GA's papers take 256 and 64."""

Finish = Callable[["AdapterManager", str], None]
"""Lets an adapter of a model, made meanwhile, start where the rows said."""


@dataclass
class InitRows:
    """Rows to start from, in any form that ``train`` takes.

    Attributes:
        data: rows, or where they are.
        count: how many rows are looked at.
        tokenizer: for data that is text; by default the one that the model was trained or asked with.
        columns: what the columns are called.
        max_length: tokens a row is cut to.
    """

    data: Any
    count: int = ROWS
    tokenizer: Any = None
    columns: Mapping[str, str] | None = None
    max_length: int | None = None

    @classmethod
    def of(cls, data: Any, count: Any, tokenizer: Any, columns: Any, max_length: Any) -> InitRows | None:
        """The rows that a command is given, None for none; see the attributes.

        Raises:
            ConfigError: the number is impossible, or something is said of rows and there are none.
        """
        if isinstance(data, InitRows):
            return data
        if data is None:
            said = {"init_rows": count, "tokenizer": tokenizer, "columns": columns, "max_length": max_length}
            useless = next((name for name, value in said.items() if value is not None), None)
            if useless is None:
                return None
            raise ConfigError(f"{useless} is of rows to start from, and none are given (init_data=…)", field=useless)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"init_rows must be a whole number of at least 1, not {count!r:.40}", field="init_rows")
        return cls(data, count or ROWS, tokenizer, columns, max_length)

    def __post_init__(self) -> None:
        self._read: Any = None

    def read(self, ctx: SessionContext, model: nn.Module, *, loss: bool) -> Any:
        """The rows as a training would give them to a base model; read once.

        Args:
            ctx: the session's.
            model: the base model.
            loss: whether a loss is computed of them.
        """
        from nbpeft.training.loop.rows import first_rows

        if self._read is None:
            tokenizer = ctx.tokenizers.get(model) if self.tokenizer is None else self.tokenizer
            reading: dict[str, Any] = {"columns": self.columns, "max_length": self.max_length}
            self._read = first_rows(model, self.data, rows=self.count, tokenizer=tokenizer, loss=loss, **reading)
        return self._read


@contextmanager
def starting_from(
    ctx: SessionContext, model: nn.Module, config: AdapterConfig, rows: InitRows | None, notes: list[str]
) -> Iterator[Finish]:
    """Shows rows to a base model, so that an adapter that is made in the block can start from them.

    Args:
        ctx: the session's.
        model: the base model, with adapters or without; it stays as it is.
        config: of the adapter to come.
        rows: None where none were given.
        notes: what the adapter starts from is added to them.

    Raises:
        ConfigError: the init needs rows and there are none, or the other way round.
        TrainingError: the rows cannot be read.
    """
    from nbpeft.model.from_data.start_from_rows import init_from_data, lacks_rows, reads_a_file, started_from

    init = init_from_data(config)
    if rows is None and lacks_rows(model, config):
        raise ConfigError(
            f"init_lora_weights={init!r} starts from rows of what is to be learned: give them (init_data=…)",
            field="init_lora_weights",
        )
    if rows is None and not reads_a_file(model, config):
        yield lambda manager, name: None
        return
    loss = init == "lora_ga"
    read = rows.read(ctx, model, loss=loss) if rows is not None and init else None
    notes += read.notes(loss=loss) if read is not None else ()
    with started_from(model, config, read) as start:
        yield lambda manager, name: notes.append(start.finish(manager, name))
