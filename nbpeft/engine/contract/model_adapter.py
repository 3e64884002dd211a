"""The contract of an adapter without layers: it acts on whole calls of a model, in ``forward`` and ``generate``.

A ``ModelAdapter`` puts trained vectors in front of what a model reads:

    input_tokens     embeddings in front of the input's (soft prompts)
    decoder_tokens   the same for the decoder of an encoder-decoder model
    cached_states    keys and values in front of those that attention caches (a prefix)

It hangs at the input embedding, which it leaves as it is: so it moves, trains, is saved and is copied with the model
as every adapter does. ``model_calls`` puts what it gives into a call, with mask, positions and labels. One that
``WeighsTokens`` says besides which tokens a language model learns, its own among them, and how much each counts. One
that ``AddsInside`` adds to what modules inside the model give (``inner_calls``), and one that ``RunsBeside`` changes
what blocks read (``side_network``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeGuard

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import Adapter, AdapterSite, TransformsOutput
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.errors import ConfigError


class ModelAdapter(Adapter, TransformsOutput):
    """An adapter that acts on calls of the whole model. Subclass it in ``methods/``.

    A subclass makes its modules in ``__init__``, from the config alone, with the initial values that torch draws;
    ``initialise`` overwrites those that depend on the model.

    Attributes:
        call_argument: name of an argument of calls that is for the adapter alone, its ``base.context``; or empty.
        token_count: embeddings that it puts in front of the input's.
        decoder_token_count: the same for a decoder that has an encoder.
        state_count: keys and values that it puts in front of the cached ones.
    """

    is_tied: ClassVar[bool] = True  # it leaves the embedding's weight as it is, whoever shares that
    peft: ClassVar[PeftNames] = PeftNames(shown_as="prompt_encoder")
    call_argument: ClassVar[str] = ""
    token_count: int = 0
    decoder_token_count: int = 0
    state_count: int = 0

    def __init__(self, config: Any) -> None:
        super().__init__()

    # What a method gives

    def initialise(self, config: Any, base: BaseLayer) -> None:
        """Gives new parameters their values, as far as those depend on the model; without gradient.

        Args:
            config: the method's own config.
            base: the input embedding.
        """

    def input_tokens(self, base: BaseLayer) -> Tensor:
        """Embeddings (1 or rows, ``token_count``, features) to put in front of the input's.

        Args:
            base: the input embedding; its ``context`` is what the method prepared for the call.
        """
        raise NotImplementedError

    def decoder_tokens(self, base: BaseLayer) -> Tensor:
        """Embeddings (1 or rows, ``decoder_token_count``, features) to put in front of the decoder's input."""
        raise NotImplementedError

    def cached_states(self, base: BaseLayer) -> Tensor:
        """Keys and values (1 or rows, ``state_count``, layers, 2, heads, head features) to begin the cache with."""
        raise NotImplementedError

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Refuses a model that the method cannot act on.

        Raises:
            ConfigError: it is one.
        """

    # What follows from that

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters; see ``Adapter``."""
        if not kind.takes_ids:
            raise ConfigError(f"{path} is no embedding, so {cls.__name__} has nothing to put tokens in front of")
        with torch.device("meta"):
            return {name: tuple(parameter.shape) for name, parameter in cls(config).named_in_files().items()}

    @classmethod
    def create(cls, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded parameters or makes new ones; see ``Adapter``."""
        if tensors is None:
            made = cls(config)
            with torch.no_grad():
                made.initialise(config, site.base)
            named = made.named_in_files()
            tensors = {name: value.detach().to(site.base.device, site.dtype) for name, value in named.items()}
        return cls.bound(config, tensors)

    @classmethod
    def bound(cls, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        """Makes an adapter of a config whose parameters, by their name in files, are these tensors."""
        with torch.device("meta"):
            made = cls(config)
        paths = made.paths_by_name_in_files()
        for name, tensor in tensors.items():
            owner, _, own = paths[name].rpartition(".")
            setattr(made.get_submodule(owner), own, nn.Parameter(tensor.detach(), name not in cls.frozen_parameters))
        return made

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Nothing to add to the embedding's output; see ``Adapter``."""
        return base_output.new_zeros(()).expand_as(base_output)

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """The embedding's output as it is."""
        return output

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """Zeros; see ``Adapter``."""
        return torch.zeros_like(weight)

    def delta_size(self, weight: Tensor, base: BaseLayer) -> tuple[float, int | None]:
        """The norm of its parameters; see ``Adapter``."""
        norms = [torch.linalg.vector_norm(parameter.detach().float()) for parameter in self.parameters()]
        return float(torch.stack(norms).norm()), None

    def unmergeable_reason(self, base: BaseLayer) -> str:
        """Why it cannot be merged; see ``Adapter``."""
        return "the weights: it puts trained tokens in front of the input and changes no weight"

    def swap_refusal(self) -> str:
        """Why nothing takes its place; see ``Adapter``."""
        return "is a prompt of the whole model; load the other one beside it and switch with set_adapter()"

    def saved_tensors(self, shapes: Any) -> dict[str, Tensor]:
        """All parameters; see ``Adapter``."""
        return dict(self.named_in_files())

    def name_in_files(self, name: str) -> str:
        """What a file calls a parameter, by its path here, before ``file_keys`` of the method spells it."""
        return name

    def paths_by_name_in_files(self) -> dict[str, str]:
        """What a file calls a parameter or buffer -> its path here."""
        named = (*self.named_parameters(), *self.named_buffers())
        return {self.name_in_files(path): path for path, _ in named}

    def named_in_files(self) -> dict[str, nn.Parameter]:
        """All parameters, by their name in files."""
        return {self.name_in_files(path): parameter for path, parameter in self.named_parameters()}

    def reset_(self, base: BaseLayer) -> None:
        """Overwrites all parameters with zeros."""
        for parameter in self.parameters():
            parameter.detach().zero_()


class WeighsTokens(ABC):
    """Says what of a call with labels a language model learns; a ``ModelAdapter`` with tokens in front of the input."""

    @abstractmethod
    def learned(self, labels: Tensor, start: int, front: int, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """The labels of a call as the adapter wants them, and how much each counts in the mean.

        Args:
            labels: int64 (rows, positions), for all that is in front of the input, and then the input; -100 where
                nothing is learned. Those of the adapter's own tokens are among them, -100 so far.
            start: the position of its own tokens.
            front: that of the input.
            base: the input embedding; its ``context`` is what the method prepared for the call.

        Returns:
            New labels, and float32 weights, both (rows, positions).
        """


class AddsInside(ABC):
    """Adds to what some modules inside the model give, such as the attentions of some layers; a ``ModelAdapter``.

    Attributes:
        places: paths of the modules in the base model.
    """

    places: tuple[str, ...]

    @abstractmethod
    def addition(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int
    ) -> Tensor:
        """What to add to the output of a module, or to the first part of it; shaped like that.

        Args:
            path: of the module.
            module: the module; layers inside it act as in its own call.
            args: what it was called with.
            kwargs: likewise.
            rows: rows to call those layers with where they are called with something else than the input: 1, or as
                many as the input has where each is served by an adapter of its own.
        """


class RunsBeside(ABC):
    """Has a network that runs beside the model, whose state goes through some blocks of it; a ``ModelAdapter``.

    Its method declares a ``context`` of None (``CallInputs``): the state takes that place while the call runs.

    Attributes:
        title: of its method, for messages.
        places: paths of the blocks in the base model, one behind the other.
        loss_weight: factor on its own loss.
        last_loss: the loss of the last call that had labels, detached; None after one that had none.
    """

    title: str
    places: tuple[str, ...]
    loss_weight: float
    last_loss: Tensor | None = None

    @abstractmethod
    def first_state(self, model: nn.Module, call: dict[str, Any]) -> Tensor:
        """The state in front of the first block, (rows, length, features).

        Args:
            model: the base model.
            call: the arguments of its call by name; changed where a cache has to keep what the network computes.
        """

    @abstractmethod
    def injected(self, path: str, hidden: Tensor, state: Tensor, scale: float) -> Tensor:
        """What a block reads in place of its hidden states.

        Args:
            path: of the block.
            hidden: (rows, length, features).
            state: in front of it.
            scale: factor on what is added.
        """

    @abstractmethod
    def advanced(self, path: str, hidden: Tensor, state: Tensor) -> Tensor:
        """The state behind a block.

        Args:
            path: of the block.
            hidden: what it gave.
            state: in front of it.
        """

    @abstractmethod
    def own_loss(self, model: nn.Module, call: Mapping[str, Any], state: Tensor) -> Tensor | None:
        """The loss of the network by itself; None where it has none.

        Args:
            model: the base model.
            call: the arguments of its call by name, ``labels`` among them.
            state: in front of the first block.
        """


def learns_prompt(adapter: object) -> TypeGuard[ModelAdapter]:
    """Whether something is an adapter that puts tokens or states in front of what a model reads."""
    return isinstance(adapter, ModelAdapter) and not isinstance(adapter, AddsInside | RunsBeside)
