"""The network of a ShadowPEFT adapter as a separate model."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from nbpeft.engine.methods.shadow.losses import class_loss, in_dtype_of, language_loss, last_tokens
from nbpeft.engine.tree.model_tree import embedding_of, frozen_module
from nbpeft.errors import AdapterError

_FOR_HEADS = ("logits_to_keep", "num_logits_to_keep", "num_items_in_batch")


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """A network with its projection and a head: ``head(projection(backbone(x)))``, a causal LM or a classifier.

    Args:
        backbone: the network.
        projection: projection to the head's features, or None.
        head: a language modeling or classification head; None for hidden states.
        is_classification: whether the head is a classification head.
        input_embeddings: input embedding of another model to use; not in this model's state dict.
    """

    main_input_name = "input_ids"
    shared_embeddings: nn.Module | None = None
    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: Any,
        projection: nn.Module | None = None,
        head: nn.Module | None = None,
        is_classification: bool = False,
        input_embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone.config)
        self.backbone = backbone
        self.shadow_hidden_projection = nn.Identity() if projection is None else projection
        self.head = head
        self.is_classification = is_classification
        object.__setattr__(self, "shared_embeddings", input_embeddings)  # not a submodule: it belongs to the base model
        self.generation_config = GenerationConfig.from_model_config(self.config)

    def can_generate(self) -> bool:  # type: ignore[override]
        """Whether the model is a language model."""
        return getattr(self, "head", None) is not None and not getattr(self, "is_classification", False)

    def get_input_embeddings(self) -> Any:
        """The network's input embedding, or the shared one."""
        shared = self.shared_embeddings
        return embedding_of(self.backbone) if shared is None else shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets another embedding."""
        if self.shared_embeddings is None:
            self.backbone.set_input_embeddings(value)
        else:
            object.__setattr__(self, "shared_embeddings", value)

    def get_output_embeddings(self) -> Any:
        """The head of a language model."""
        return None if getattr(self, "is_classification", False) else self.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes hidden states, logits of all tokens or of classes, and the loss if labels are given.

        Raises:
            AdapterError: there is no input.
        """
        options = {name: value for name, value in kwargs.items() if name not in _FOR_HEADS} | {"return_dict": True}
        if self.shared_embeddings is not None and options.get("inputs_embeds") is None:
            if input_ids is None:
                raise AdapterError("pass input_ids or inputs_embeds")
            embeds = self.get_input_embeddings()(input_ids)
            options["inputs_embeds"], input_ids = in_dtype_of(self.backbone, embeds), None
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden = self.shadow_hidden_projection(output.last_hidden_state)
        if self.head is None:
            return hidden
        hidden = in_dtype_of(self.head, hidden)
        if self.is_classification:
            logits = self.head(last_tokens(hidden, attention_mask))
            loss = None if labels is None else class_loss(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)
        logits = self.head(hidden)
        loss = None if labels is None else language_loss(logits[:, :-1], labels[:, 1:])
        cache = next((output[name] for name in ("cache", "past_key_values") if name in output), None)
        return CausalLMOutputWithPast(loss, logits, cache)


def detached(network: Any, model: nn.Module, *, owned: bool) -> DetachedShadowModel:
    """The network of an adapter as a model.

    Args:
        network: the adapter, a ``ShadowNetwork``.
        model: its base model.
        owned: copy all tensors; else they are shared.
    """
    own = network._modules
    head = embedding_of(model, output=True) if network.recipe.is_lm else own.get("shadow_head")
    backbone, projection = own["shadow_backbone"], own["shadow_projection"]
    embedding = embedding_of(model) if network.recipe.shares else None
    if owned:
        embedding = None if embedding is None else frozen_module(embedding)  # its wrapper contains the network
        backbone, projection, head, embedding = copy.deepcopy((backbone, projection, head, embedding))
        if embedding is not None:
            backbone.embed_tokens, embedding = embedding, None
    return DetachedShadowModel(
        backbone, projection, head, is_classification="shadow_head" in own, input_embeddings=embedding
    )
