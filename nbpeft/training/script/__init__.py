"""A training of a notebook as a script that a person could have written: one process, several, or a cluster's queue.

export     what is exported, and the files that are written together
sources    where base model, tokenizer and rows come from, said without this machine's paths
python     values as source text, formatted as ruff and black format it
"""

from __future__ import annotations

from nbpeft.training.script.export import ScriptFiles as ScriptFiles
from nbpeft.training.script.export import export_script as export_script
from nbpeft.training.script.export import unwritable as unwritable
