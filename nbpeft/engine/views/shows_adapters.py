"""Base class of the modules that show adapters as submodules: layers, blocks and ``base_model`` of a PeftModel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class ShowsAdapters(nn.Module):
    """A module with submodules that show adapters, which are updated before anybody lists them."""

    def show_adapters(self) -> None:
        """Updates the submodules that show the adapters after these have changed."""
        raise NotImplementedError

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """With the adapters under their declared names; see ``nn.Module``."""
        self.show_adapters()
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """With the adapters under their declared names; see ``nn.Module``."""
        self.show_adapters()
        yield from super().named_children()

    def __repr__(self) -> str:
        self.show_adapters()
        return super().__repr__()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the adapters under their declared names; see ``nn.Module``."""
        self.show_adapters()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.show_adapters()
        super()._load_from_state_dict(*args, **kwargs)
