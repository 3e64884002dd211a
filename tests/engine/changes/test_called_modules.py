"""The modules that a call of a model may reach."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nbpeft.engine.changes.called_modules import called_modules


class Asked(nn.Module):
    """Counts how often it was asked for what it calls."""

    times = 0

    def called_children(self) -> Iterator[nn.Module]:
        self.times += 1
        return self.children()


def test_a_module_that_several_call_is_listed_and_asked_once() -> None:
    first, second, inner, last = nn.Module(), nn.Module(), Asked(), nn.Linear(1, 1)
    first.inner, second.inner, inner.last = inner, inner, last
    model = nn.Sequential(first, second)
    assert called_modules(model) == [model, first, inner, last, second] and inner.times == 1
