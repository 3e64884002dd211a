"""Deleting, renaming, copying and freezing adapters."""

from __future__ import annotations

import argparse

from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, THE_MODEL, verb

_NAME = argument("name", metavar="NAME", completes="adapter", help="the adapter")
_NEW = argument("new", metavar="NEW", help="the new name")


@verb("delete", "Take an adapter out of the model.", _NAME, THE_MODEL, example="%lora delete sql")
def delete(options: argparse.Namespace, desk: Desk) -> object:
    """Deletes an adapter."""
    return desk.session.delete(options.name, model=desk.chosen(options.model))


@verb("rename", "Give an adapter another name.", _NAME, _NEW, THE_MODEL, example="%lora rename sql sql_v1")
def rename(options: argparse.Namespace, desk: Desk) -> object:
    """Renames an adapter."""
    return desk.session.rename(options.name, options.new, model=desk.chosen(options.model))


@verb("copy", "Copy an adapter under a new name.", _NAME, _NEW, ON_MODEL, example="%lora copy sql sql_backup")
def copy(options: argparse.Namespace, desk: Desk) -> object:
    """Copies an adapter."""
    return desk.session.copy(options.name, options.new, model=desk.chosen(options.model))


@verb("freeze", "Keep an adapter from training.", _NAME, ON_MODEL, example="%lora freeze sql")
def freeze(options: argparse.Namespace, desk: Desk) -> object:
    """Freezes an adapter."""
    return desk.session.freeze(options.name, model=desk.chosen(options.model))


@verb("unfreeze", "Let an adapter train while it is active.", _NAME, ON_MODEL, example="%lora unfreeze sql")
def unfreeze(options: argparse.Namespace, desk: Desk) -> object:
    """Unfreezes an adapter."""
    return desk.session.unfreeze(options.name, model=desk.chosen(options.model))
