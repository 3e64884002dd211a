"""Which names an adapter can have."""

from __future__ import annotations

import pytest

from nbpeft.engine.config.adapter_names import check_name
from nbpeft.errors import AdapterError


@pytest.mark.parametrize("name", ["\ud800", "half \udbff", "\udc00", "\udfff"])
def test_no_surrogate_is_part_of_a_name(name: str) -> None:
    with pytest.raises(AdapterError, match="a surrogate character"):
        check_name(name)


@pytest.mark.parametrize("name", ["\ud7ff", "\ue000", "a b", "\U0001f600"])
def test_letters_beside_the_surrogates_are(name: str) -> None:
    check_name(name)
