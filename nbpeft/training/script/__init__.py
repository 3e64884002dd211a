"""Exports a notebook's training as a plain script: for one process, several, or a cluster's queue.

export     exporting a training, and writing the files together
sources    sources of base model, tokenizer and rows, without paths of this machine
unfinished  the run that a script continues when it is started again
python     values as source text, in the format of ruff and black
"""

from __future__ import annotations

from nbpeft.training.script.export import ScriptFiles as ScriptFiles
from nbpeft.training.script.export import export_script as export_script
from nbpeft.training.script.export import unwritable as unwritable
from nbpeft.training.script.unfinished import unfinished_run as unfinished_run
