"""What peft's AdaMSS needs of scikit-learn, for tests where that is not installed.

Its k-means is then that of nbpeft, of which test_adamss.py says what scikit-learn's gives.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest import mock

from peft.tuners.adamss import config, layer

from nbpeft.engine.methods.projections.decomposition import row_clusters

_post_init = config.AdamssConfig.__post_init__


def _checked_with_module(self: Any) -> None:
    with mock.patch.dict(sys.modules, {"sklearn": ModuleType("sklearn")}):
        _post_init(self)


def _clustering(rows: Any, count: int, iterations: int) -> tuple[Any, int]:
    assert iterations == 10
    count = min(count, len(rows))
    return row_clusters(rows, count), count


def install() -> None:
    """Lets peft's AdaMSS work from now on."""
    setattr(config.AdamssConfig, "__post_init__", _checked_with_module)  # noqa: B010
    layer.clustering_Z = _clustering
