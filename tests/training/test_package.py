from __future__ import annotations

import nbpeft.training


def test_every_public_name_is_found():
    for name in nbpeft.training.__all__:
        assert callable(getattr(nbpeft.training, name))
    assert not hasattr(nbpeft.training, "no_such_name")
