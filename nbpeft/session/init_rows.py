"""Rows for data-dependent inits of adapters."""

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
"""Default number of rows. The papers of CorDA and LoRA-GA use 256 and 64."""

Finish = Callable[["AdapterManager", str], None]
"""Completes the init of an adapter that was created in the block."""


@dataclass
class InitRows:
    """Rows for an init, in any form that ``train`` accepts.

    Attributes:
        data: rows, or where they are.
        count: number of rows to use.
        tokenizer: tokenizer for text data; by default the one last used with the model.
        columns: names of the columns.
        max_length: number of tokens to which rows are cut.
    """

    data: Any
    count: int = ROWS
    tokenizer: Any = None
    columns: Mapping[str, str] | None = None
    max_length: int | None = None

    @classmethod
    def of(cls, data: Any, count: Any, tokenizer: Any, columns: Any, max_length: Any) -> InitRows | None:
        """Returns the rows that were given to a command, or None; see the attributes for the arguments.

        Raises:
            ConfigError: the number is invalid, or there are options for rows but no rows.
        """
        if isinstance(data, InitRows):
            return data
        if data is None:
            options = {"init_rows": count, "tokenizer": tokenizer, "columns": columns, "max_length": max_length}
            useless = next((name for name, value in options.items() if value is not None), None)
            if useless is None:
                return None
            raise ConfigError(f"{useless} has no effect without rows to initialize from (init_data=…)", field=useless)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"init_rows must be a whole number of at least 1, not {count!r:.40}", field="init_rows")
        return cls(data, count or ROWS, tokenizer, columns, max_length)

    def __post_init__(self) -> None:
        self._read: Any = None

    def read(self, ctx: SessionContext, model: nn.Module, *, loss: bool) -> Any:
        """Returns the rows in the form that training gives to a base model; they are read only once.

        Args:
            ctx: context of the session.
            model: the base model.
            loss: whether a loss will be computed, so that labels are needed.
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
    """Runs rows through a base model, to initialize an adapter that is created in the block.

    A description of the init is added to ``notes``.

    Raises:
        ConfigError: the init needs rows and there are none, or there are rows and the init does not use them.
        TrainingError: the rows cannot be read.
    """
    from nbpeft.model.from_data.start_from_rows import init_from_data, lacks_rows, reads_a_file, started_from

    init = init_from_data(config)
    if rows is None and lacks_rows(model, config):
        raise ConfigError(
            f"init_lora_weights={init!r} needs rows of the training data (init_data=…)", field="init_lora_weights"
        )
    if rows is None and not reads_a_file(model, config):
        yield lambda manager, name: None
        return
    loss = init == "lora_ga"
    read = rows.read(ctx, model, loss=loss) if rows is not None and init else None
    notes += read.notes(loss=loss) if read is not None else ()
    with started_from(model, config, read) as start:
        yield lambda manager, name: notes.append(start.finish(manager, name))
