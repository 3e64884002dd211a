"""Where a function from outside may send a target elsewhere, or leave it out, before it is adapted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.tree.model_tree import Site
from nbpeft.errors import NotSupportedError

Redirect = Callable[[nn.Module, AdapterConfig, str | None, Site], nn.Module | None]
"""(model, config, name of the adapter, target) -> the module to adapt; None leaves the target out."""
_redirects: dict[object, Redirect] = {}


def set_redirect(owner: object, redirect: Redirect | None) -> None:
    """Sets the function that is asked for each target; None removes it.

    Args:
        owner: whose function it is; it replaces the former one of the same owner.
        redirect: the function.
    """
    if redirect is None:
        _redirects.pop(owner, None)
    else:
        _redirects[owner] = redirect


def redirected(
    model: nn.Module, config: AdapterConfig, name: str | None, site: Site, sites: Sequence[Site]
) -> Site | None:
    """Returns the place to adapt instead of a target, usually the target itself; None to leave it out."""
    for redirect in list(_redirects.values()):
        module = redirect(model, config, name, site)
        if module is None:
            return None
        if module is not site.module and module is not site.wrapper:
            found = next((other for other in sites if module is other.module or module is other.wrapper), None)
            if found is None:
                raise NotSupportedError(
                    f"{site.path}: a {type(module).__name__} outside of the model cannot be adapted"
                )
            site = found
    return site
