"""What the file of an adapter is expected to have."""

from __future__ import annotations

from nbpeft.engine.injection.plan import plan
from nbpeft.model.saving.loading import expected
from tests.tiny_models import config, llama


def test_an_embedding_that_is_copied_is_not_optional_beside_its_copy() -> None:
    model = llama()
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(expected(model, plan(model, config())).optional) == ends
    copied = expected(model, plan(model, config(modules_to_save=["embed_tokens"])))
    assert set(copied.optional) == ends - {"model.embed_tokens.weight"}
    assert set(copied.copies) == {"model.embed_tokens"}
