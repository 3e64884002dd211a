"""The contract of adapters without target layers (prompt methods): they change whole calls of the model.

A ``ModelAdapter`` prepends trained vectors to what the model reads, in ``forward`` and ``generate``:

    input_tokens     embeddings in front of those of the input (soft prompts)
    decoder_tokens   the same for the decoder of an encoder-decoder model
    cached_states    keys and values at the start of the attention cache (a prefix)

It belongs to the input embedding, or to the first layer of a model that has none where the method does not read it.
That layer's output is not changed. So it is trained, saved and copied with the model like every other adapter. Where
a handle lists learned prompts as its own modules, their wrapper is not in the tree of the base model.
``model_calls`` inserts its vectors into a call and extends the attention mask, positions and labels. Capabilities in
addition to that:

    WeighsTokens     decides which tokens a language model learns, and the weight of each in the loss
    AddsInside       adds to the outputs of modules inside the model (``inner_calls``)
    HasSideNetwork   runs a side network that changes the inputs of blocks (``side_network``)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeGuard

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import Adapter, AdapterSite, HotSwaps, MeasuresDelta, TransformsOutput, Untargeted
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.errors import ConfigError


class ModelAdapter(Adapter, TransformsOutput, Untargeted, MeasuresDelta, HotSwaps):
    """An adapter that changes calls of the whole model. Subclass it in ``methods/``.

    A subclass creates its modules in ``__init__``, from the config alone, with torch's default initial values;
    ``initialise`` overwrites those that depend on the model.

    Attributes:
        needs_embedding: whether it reads the input embedding; other methods also work on models without one.
        call_argument: keyword argument of calls that is passed only to the adapter, as ``base.context``; or empty.
        token_count: number of embeddings that it prepends to the input.
        decoder_token_count: number of embeddings that it prepends to the input of an encoder-decoder model's decoder.
        state_count: number of key/value positions that it prepends to the cache of each layer.
    """

    peft: ClassVar[PeftNames] = PeftNames(shown_as="prompt_encoder")
    call_argument: ClassVar[str] = ""
    needs_embedding: ClassVar[bool] = True
    token_count: int = 0
    decoder_token_count: int = 0
    state_count: int = 0

    def __init__(self, config: Any) -> None:
        super().__init__()

    # What a method implements

    def initialise(self, config: Any, base: BaseLayer) -> None:
        """Sets initial values that depend on the model, in place; called under ``torch.no_grad()``.

        Args:
            config: the method's own config.
            base: the input embedding.
        """

    def input_tokens(self, base: BaseLayer) -> Tensor:
        """Computes the embeddings to prepend to the input.

        Args:
            base: the input embedding; its ``context`` is what ``CallInputs.context`` returned for the call.

        Returns:
            (1 or rows, ``token_count``, features).
        """
        raise NotImplementedError

    def decoder_tokens(self, base: BaseLayer) -> Tensor:
        """Computes the embeddings to prepend to the decoder's input: (1 or rows, ``decoder_token_count``, features)."""
        raise NotImplementedError

    def all_tokens(self, base: BaseLayer) -> Tensor:
        """Computes all embeddings of the prompt, those for a decoder last, used or not: (1 or rows, tokens, features).

        Args:
            base: as for ``input_tokens``.
        """
        first = self.input_tokens(base)
        return torch.cat([first, self.decoder_tokens(base)], 1) if self.decoder_token_count else first

    def cached_states(self, base: BaseLayer) -> Tensor:
        """Computes keys and values to start the cache with.

        Args:
            base: the input embedding; its ``context`` is what ``CallInputs.context`` returned for the call.

        Returns:
            (1 or rows, ``state_count``, layers, 2 for keys and values, heads, features of a head).
        """
        raise NotImplementedError

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Refuses models that the method does not support.

        Args:
            config: the method's own config.
            model: the base model.

        Raises:
            ConfigError: the model is not supported.
        """

    # What this class implements for all methods

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        if cls.needs_embedding and not kind.takes_ids:
            raise ConfigError(f"{path} is not an embedding, so {cls.__name__} cannot insert tokens before its output")
        with torch.device("meta"):
            return {name: tuple(parameter.shape) for name, parameter in cls(config).named_in_files().items()}

    @classmethod
    def create(cls, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded parameters or makes new ones."""
        if tensors is None:
            made = cls(config)
            with torch.no_grad():
                made.initialise(config, site.base)
            named = made.named_in_files()
            tensors = {name: value.detach().to(site.base.device, site.dtype) for name, value in named.items()}
        return cls.bound(config, tensors)

    @classmethod
    def bound(cls, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        """Builds an adapter from given tensors.

        Args:
            config: the method's own config.
            tensors: name in files -> tensor, which is used without a copy.

        Returns:
            The adapter.
        """
        with torch.device("meta"):
            made = cls(config)
        paths = made.paths_by_name_in_files()
        for name, tensor in tensors.items():
            owner, _, own = paths[name].rpartition(".")
            setattr(made.get_submodule(owner), own, nn.Parameter(tensor.detach(), name not in cls.frozen_parameters))
        return made

    def forward(self, x: Tensor, base_output: Tensor | None = None, base: BaseLayer | None = None) -> Tensor:
        """Zeros: nothing is added to the embedding's output. Without a layer, as scripts call it, ``tokens_at``."""
        if base is None or base_output is None:
            return self.tokens_at(x) if base_output is None else self.tokens_at(x, base_output)
        return base_output.new_zeros(()).expand_as(base_output)

    def tokens_at(self, ids: Tensor, *task_ids: Tensor) -> Tensor:
        """Computes the vectors of virtual tokens, as scripts call PEFT's prompt encoders.

        Args:
            ids: int64, (rows, tokens).
            *task_ids: the task of each row, int64, (rows,); only for prompts of several tasks.

        Returns:
            (rows, tokens, features).
        """
        raise NotImplementedError(f"a {type(self).__name__} is not called with ids: use get_prompt(batch_size=…)")

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        return output

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        return torch.zeros_like(weight)

    def delta_size(self, weight: Tensor, base: BaseLayer) -> tuple[float, int | None]:
        norms = [torch.linalg.vector_norm(parameter.detach().float()) for parameter in self.parameters()]
        return float(torch.stack(norms).norm()), None

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return "the weights: it inserts trained tokens before the input and changes no weight"

    def swap_refusal(self) -> str:
        return "is a prompt of the whole model; load the other one under another name and switch with set_adapter()"

    def saved_tensors(self, shapes: Any) -> dict[str, Tensor]:
        return dict(self.named_in_files())

    def name_in_files(self, name: str) -> str:
        """The name of a parameter in files, given its path in this module; ``FileFormat.keys`` is applied later."""
        return name

    def paths_by_name_in_files(self) -> dict[str, str]:
        """Name of a parameter or buffer in files -> its path in this module."""
        named = (*self.named_parameters(), *self.named_buffers())
        return {self.name_in_files(path): path for path, _ in named}

    def named_in_files(self) -> dict[str, nn.Parameter]:
        """All parameters, by their name in files."""
        return {self.name_in_files(path): parameter for path, parameter in self.named_parameters()}

    def reset_(self, base: BaseLayer) -> None:
        for parameter in self.parameters():
            parameter.detach().zero_()


class WeighsTokens(ABC):
    """A ``ModelAdapter`` with input tokens that changes labels and their weights in the loss of a language model."""

    @abstractmethod
    def learned(self, labels: Tensor, start: int, front: int, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """Computes the labels of a call and their weights in the mean loss.

        Args:
            labels: int64, (rows, positions), for all prepended tokens and then the input; the loss ignores -100. The
                labels of the adapter's own tokens are -100.
            start: first position of its own tokens.
            front: first position of the input.
            base: the input embedding; its ``context`` is what ``CallInputs.context`` returned for the call.

        Returns:
            New labels (int64) and weights (float32), both (rows, positions).
        """


class AddsInside(ABC):
    """A ``ModelAdapter`` that adds to the outputs of some modules inside the model, such as attention modules.

    Attributes:
        places: paths of the modules in the base model.
    """

    places: tuple[str, ...]

    @abstractmethod
    def addition(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int
    ) -> Tensor:
        """Computes what to add to the output of a module.

        Args:
            path: path of the module.
            module: the module; layers inside it may be called, and apply their adapters as in the module's own call.
            args: positional arguments of the module's call.
            kwargs: keyword arguments of the module's call.
            rows: batch size for calls of layers inside ``module`` with other inputs than the module's: 1, or the batch
                size of the input in a mixed batch.

        Returns:
            A tensor shaped like the output of the module, or like its first element if that is a tuple.
        """


class HasSideNetwork(ABC):
    """A ``ModelAdapter`` with a side network, whose state is updated at some blocks of the model.

    Its method declares a ``CallInputs.context`` that returns None; during a call the engine puts the state there.

    Attributes:
        title: name of its method, for messages.
        places: paths of the blocks in the base model, in the order of their calls.
        loss_weight: factor on its own loss.
        last_loss: its own loss in the last call, detached; None if that call had no labels.
        last_state: the state before the first block in the last call.
    """

    title: str
    places: tuple[str, ...]
    loss_weight: float
    last_loss: Tensor | None = None
    last_state: Tensor | None = None

    @abstractmethod
    def first_state(self, model: nn.Module, call: dict[str, Any]) -> Tensor | None:
        """Computes the state before the first block from the input of the model.

        Args:
            model: the base model.
            call: name -> argument of the call; changed in place if the cache must store what the network computes.

        Returns:
            (rows, length, features); None if ``state_of`` computes it.
        """

    def state_of(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Computes the state before the first block from the input of that block.

        Args:
            hidden: (rows, length, features).
            call: name -> argument of the block, including ``hidden``.

        Returns:
            (rows, length, features).
        """
        raise NotImplementedError

    @abstractmethod
    def injected(self, path: str, hidden: Tensor, state: Tensor, scale: float) -> Tensor:
        """Computes the input of a block.

        Args:
            path: path of the block.
            hidden: its hidden states without the adapter, (rows, length, features).
            state: state before the block, (rows, length, features).
            scale: factor on what is added.

        Returns:
            New hidden states, (rows, length, features).
        """

    @abstractmethod
    def advanced(self, path: str, hidden: Tensor, state: Tensor) -> Tensor:
        """Computes the state after a block.

        Args:
            path: path of the block.
            hidden: output of the block, (rows, length, features).
            state: state before the block, (rows, length, features).

        Returns:
            The new state, (rows, length, features).
        """

    @abstractmethod
    def own_loss(self, model: nn.Module, call: Mapping[str, Any], state: Tensor) -> Tensor | None:
        """Computes the side network's own loss.

        Args:
            model: the base model.
            call: name -> argument of the call, including ``labels``.
            state: state before the first block, (rows, length, features).

        Returns:
            A scalar; None if the network has no separate loss.
        """


def learns_prompt(adapter: object) -> TypeGuard[ModelAdapter]:
    """Whether an object is an adapter that prepends tokens or cached states."""
    return isinstance(adapter, ModelAdapter) and not isinstance(adapter, AddsInside | HasSideNetwork)
