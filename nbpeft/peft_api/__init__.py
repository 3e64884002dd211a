"""nbpeft under the name ``peft``, and PEFT's import paths under the name ``nbpeft``.

names.py      PEFT's modules, the names in each, and what implements each name: one table
modules.py    creates these modules when they are imported: ``nbpeft.tuners.lora``, ``peft.tuners.lora``
install.py    ``install_as_peft``: makes ``import peft`` import nbpeft, for other libraries too
missing.py    names that nbpeft does not implement: they can be imported, and raise an error when they are used

The other files implement names of PEFT that have no other use in nbpeft.
"""
