"""Temperature, top-p and seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nbpeft.errors import ConfigError
from nbpeft.session.sampling import Sampling, shown_settings


def test_greedy_unless_it_is_asked_for() -> None:
    for greedy in (Sampling(), Sampling(temperature=0.0), Sampling(temperature=0, top_p=0.5), Sampling(seed=3)):
        assert (greedy.draws, greedy.options, dict(greedy.settings)) == (False, {}, {})
    assert Sampling(seed=3).notes and Sampling(temperature=0, top_p=0.5).notes
    assert not Sampling().notes and not Sampling(temperature=1.0, seed=3).notes


def test_what_is_given_decides_alone() -> None:
    assert Sampling(0.7).options == {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
    assert Sampling(top_p=0.9).options == {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
    assert shown_settings(Sampling(0.7, 0.9, 123456789).settings) == "temperature 0.7, top-p 0.9, seed 123456789"


def test_a_seed_that_is_left_out_is_drawn_and_shown() -> None:
    seeds = {Sampling(0.7).settings["seed"] for _ in range(20)}
    assert len(seeds) > 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature must be a number of at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)


def test_the_notebooks_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    with Sampling(0.7, seed=5).random_numbers():
        first = torch.rand(3)
        random.random()
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    with Sampling(0.7, seed=5).random_numbers():
        assert torch.equal(torch.rand(3), first)
