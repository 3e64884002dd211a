"""One file per method, in families; importing the package registers all of them.

A family lists its methods in ``__all__`` where it has other files too; without that each of its files is a method's.
"""

import importlib
import pkgutil

for _family in pkgutil.iter_modules(__path__):
    _package = importlib.import_module(f"{__name__}.{_family.name}")
    if not hasattr(_package, "__all__"):
        for _module in pkgutil.iter_modules(_package.__path__):
            importlib.import_module(f"{_package.__name__}.{_module.name}")
