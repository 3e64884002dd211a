"""Nbpeft by the name ``peft``, and PEFT's import paths under its own name.

names.py      which modules PEFT has, the names in each, and what of nbpeft each of them is: one table
modules.py    those modules, made when they are imported: ``nbpeft.tuners.lora``, ``peft.tuners.lora``
install.py    ``install_as_peft``: ``import peft`` is answered, for libraries too
missing.py    names of what nbpeft lacks: they can be imported, and refuse when they are used

The other files are what PEFT has under names of its own, over the engine: callbacks, constants, conversion, helpers,
imports, layers, mappings and merging.
"""
