"""What ``%%lora`` and ``%lora add`` share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument
from nbpeft.magics.planning import DRY_SIZES, settings_of, without_dry_run

ADAPT_OPTIONS = (
    argument(
        "--name", "-n", metavar="NAME", default=None, completes="adapter", help="name of the adapter (default: default)"
    ),
    argument("--dry-run", action="store_true", help="only show what would be adapted, counts and memory"),
    *DRY_SIZES,
    argument("--allow-missing", action="store_true", help="go on where a target matches nothing"),
    argument("--frozen", action="store_true", help="apply it without training it"),
)


def adapt(desk: Desk, options: argparse.Namespace, fields: Mapping[str, Any]) -> object:
    """Adapts the model in a variable, or shows what that would do.

    Args:
        desk: the notebook.
        options: the parsed line: ``target`` and ``ADAPT_OPTIONS``.
        fields: fields of the config.
    """
    variable = options.target
    model = desk.module(variable)
    desk.session.adopt(desk.namespace)
    name = "default" if options.name is None else options.name
    sizes = settings_of(options)
    if options.dry_run:
        return desk.session.preview(model, fields, name=name, variable=variable, **sizes)
    if sizes:
        raise without_dry_run()
    result = desk.session.add(
        model,
        fields,
        name=name,
        variable=variable,
        allow_missing=options.allow_missing,
        trainable=not options.frozen,
    )
    desk.bind(variable, result.model)
    result.release()
    return result
