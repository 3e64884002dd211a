"""A training cell as a script."""

from __future__ import annotations

import argparse

from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import verb
from nbpeft.magics.training import export as export_training


@verb(
    "export",
    "Write the last %%lora_train cell as a script, for accelerate launch on several GPUs or machines.",
    argument("path", metavar="SCRIPT", completes="path", help="a new .py file; the rows go beside it"),
    argument("--base", metavar="SOURCE", completes="path", help="where the script loads the base model from"),
    argument("--model", "-m", metavar="MODEL", completes="model", help="the model trained last if left out"),
    example="%lora export train.py",
)
def export(options: argparse.Namespace, desk: Desk) -> object:
    """Exports a training."""
    return export_training(options, desk)
