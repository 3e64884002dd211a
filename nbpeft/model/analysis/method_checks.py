"""``check_method``: checks that a method keeps what nbpeft promises of every method, on small models."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.random_numbers import drawing_from
from nbpeft.engine.config.adapter_names import BASE_NAME
from nbpeft.engine.contract.adapter import AdapterConfig, Rescales
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.errors import (
    ConfigError,
    HotSwapError,
    MergeError,
    MissingPackageError,
    NbpeftError,
    did_you_mean,
    few,
    in_one_line,
    shortened,
    with_article,
)
from nbpeft.jsonable import as_json
from nbpeft.model.analysis.method_report import MethodCheck, MethodReport, Status
from nbpeft.model.analysis.method_trials import Trial, randomize, small_trials, trials_on
from nbpeft.model.handle.peft_model import PeftModel
from nbpeft.model.handle.tasks import get_peft_model
from nbpeft.model.swapping.hotswap import hotswap_adapter

_LONGEST_REASON = 200
_NOTHING = 1e-3
"""Share of an adapter's effect below which a factor on it, at least one half of it, counts as not used."""
_DRAWS = 12
"""Seeds with which a dropout is tried: a method may drop its whole delta with a probability of one half."""


class _Failure(Exception):
    """A check failed; the message says what was wrong."""


class _NotPromised(Exception):
    """A check does not apply; the message says why."""


class _Undo(Exception):
    """Ends a transaction, so that it is undone."""


def check_method(
    config: AdapterConfig,
    model: nn.Module | None = None,
    *,
    inputs: Any = None,
    skip: Collection[str] | Mapping[str, str] = (),
) -> MethodReport:
    """Checks that a method works as nbpeft's own do: gradients, merging, files, several adapters, copies, quantization.

    ::

        report = nbpeft.check_method(ScaleConfig(start=0.0))
        print(report)
        report.raise_for_failures()

    A failing check raises nothing; the report says what was wrong. A method may refuse a kind of layer, merging,
    a second adapter or a mixed batch with an error of nbpeft; the report has the reason. It has to work on one model.

    Args:
        config: a config of the method.
        model: a small model without adapters, of which copies are checked in float32 and bfloat16.
            None for a LLaMA with random weights and, for methods that target layers, models of one layer of each
            kind, called ``target``, to which the config's targets are set.
        inputs: with ``model``: a batch as a tensor, or as keyword arguments of a call; None for random token ids.
        skip: names of checks to leave out, or name -> reason. The checks are ``injection``, ``config``, ``rollback``,
            ``identity``, ``gradients``, ``scale``, ``dropout``, ``merge``, ``unmerge``, ``save``, ``swap``, ``copy``,
            ``unload``, ``adapters``, ``rows``, ``bfloat16``, ``quantized``, ``deepcopy`` and ``pickle``.

    Returns:
        The report.

    Raises:
        ConfigError: an argument is invalid.
        UnknownMethodError: the method is not registered.
        AdapterError: ``model`` has adapters.
    """
    reasons = _check_arguments(config, model, inputs, skip)
    method = method_of(config)
    with drawing_from(0), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trials = small_trials(config) if model is None else trials_on(model, config, inputs)
        found = [check for trial in trials for check in _tried(trial, reasons)]
    if not any(check.check == "injection" and check.status in ("ok", "failed") for check in found):
        found = [
            dataclasses.replace(check, status="failed") if check.check == "injection" else check for check in found
        ]
    return MethodReport(method.title(config), tuple(found))


def _check_arguments(config: object, model: object, inputs: object, skip: Any) -> dict[str, str]:
    """Refuses invalid arguments, and returns the checks to skip with their reasons."""
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"check_method needs a config such as LoraConfig, not {with_article(config)}", field="config")
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch model, not {with_article(model)}", field="model")
    if model is None and inputs is not None:
        raise ConfigError("inputs need a model: pass model, too", field="inputs")
    if isinstance(skip, str) or not isinstance(skip, Collection):
        raise ConfigError(f"skip must be a list of checks, or a dict of reasons, not {skip!r:.60}", field="skip")
    names = [check.name for check in _CHECKS[1:]]
    for name in skip:
        if name not in names:
            hint = did_you_mean(str(name), names) or f" There are: {', '.join(names)}."
            raise ConfigError(f"skip: {name!r:.40} is not a check that can be skipped.{hint}", field="skip")
    return {name: str(skip[name]) if isinstance(skip, Mapping) else "" for name in skip}


def _tried(trial: Trial, skip: Mapping[str, str]) -> list[MethodCheck]:
    """The results of all checks on one model; of the first alone if no adapter can be added."""
    found: list[MethodCheck] = []
    for check in _CHECKS:
        if check.name in skip:
            found.append(MethodCheck(check.name, trial.name, "skipped", skip[check.name]))
            continue
        found.append(MethodCheck(check.name, trial.name, *_result(check, trial)))
        if check is _CHECKS[0] and found[0].status != "ok":
            break
    return found


def _result(check: _Check, trial: Trial) -> tuple[Status, str]:
    try:
        with drawing_from(1):
            check.run(trial)
    except _Failure as failure:
        return "failed", _reason(failure)
    except _NotPromised as reason:
        return "skipped", _reason(reason)
    except check.refusals as refusal:
        return "refused", _reason(refusal)
    except Exception as error:  # whatever the code of a method raises
        return "failed", f"{type(error).__name__}: {_reason(error)}"
    return "ok", ""


def _reason(error: Exception) -> str:
    return shortened(in_one_line(error), _LONGEST_REASON)


# What the checks share


def _fail(message: str) -> NoReturn:
    raise _Failure(message)


def _check_near(found: Tensor, expected: Tensor, trial: Trial, what: str) -> None:
    if found.shape != expected.shape:
        _fail(f"{what}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    if not difference <= trial.tolerance(expected):
        _fail(f"{what}: outputs differ by up to {difference:.2g}")


def _check_equal(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        _fail(what)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors in a model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _parameters(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the parameters of the adapter under test."""
    own = {id(parameter) for parameter in model.manager.parameters("default")}
    return {name: value.detach().clone() for name, value in model.named_parameters() if id(value) in own}


def _check_same_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    names = [
        name
        for name in sorted({*found, *expected})
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]
    if names:
        _fail(f"{what}: {few(names, 3)} differ")


# The checks


def _injection(trial: Trial) -> None:
    """An adapter can be added, and the output keeps its shape and dtype; after a refusal the model is as it was."""
    base = trial.plain()
    before, expected = _state(base), trial.output(base)
    try:
        model = get_peft_model(base, trial.own_config()).eval()
    except NbpeftError:
        _check_same_state(_state(base), before, "refused, but the model changed")
        raise
    for mode in (False, True):
        try:
            found = trial.output(model.train(mode))
        except Exception as error:  # an error of the first call is not a refusal
            _fail(f"the call raises {type(error).__name__}: {_reason(error)}")
        is_now, was = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (found, expected))
        if is_now != was and not trial.config.learns_prompt:
            _fail(f"the output is {is_now}, that of the base model {was}")
        if not bool(found.isfinite().all()):
            _fail("the output is not finite")


def _config(trial: Trial) -> None:
    """A config is equal after it was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        trial.config.save_pretrained(folder)
        again = AdapterConfig.from_pretrained(folder)
    if type(again) is not type(trial.config):
        _fail(f"{type(trial.config).__name__} is loaded as {type(again).__name__}")
    expected, found = (as_json(config.to_dict()) for config in (trial.config, again))
    names = [name for name in expected if expected[name] != found.get(name)]
    if names:
        _fail(f"{few(names, 3)} differ after save_pretrained and from_pretrained")


def _rollback(trial: Trial) -> None:
    """A command that fails after an adapter was added leaves the model as it was."""
    base = trial.plain()
    before, kinds = _state(base), [type(module) for module in base.modules()]
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    manager = AdapterManager(base)
    with suppress(_Undo), manager.transaction():
        manager.add("default", trial.own_config())
        raise _Undo
    if kinds != [type(module) for module in base.modules()]:
        _fail("adding an adapter was undone, but modules are still replaced")
    _check_same_state(_state(base), before, "adding an adapter was undone, but weights of the model changed")
    if trainable != [name for name, parameter in base.named_parameters() if parameter.requires_grad]:
        _fail("adding an adapter was undone, but requires_grad of the model's parameters changed")


def _identity(trial: Trial) -> None:
    """A new adapter changes nothing."""
    if trial.config.learns_prompt:
        raise _NotPromised("a learned prompt changes the output from the start")
    expected = trial.output(trial.plain())
    _check_near(trial.output(trial.fresh()), expected, trial, "a new adapter changes what the model computes")


def _gradients(trial: Trial) -> None:
    """Gradients reach every trained parameter, and no weight of the base model."""
    model = trial.randomized().train()
    own = _parameters(model)
    loss = trial.call(model).float().square().sum()
    if not loss.requires_grad:
        _fail("the output depends on no parameter of the adapter")
    torch.autograd.backward(loss)
    for name, parameter in model.named_parameters():
        if name not in own and (parameter.requires_grad or parameter.grad is not None):
            _fail(f"{name}, a parameter of the base model, is trained")
        if name in own and parameter.requires_grad and not _has_gradient(parameter):
            _fail(f"no gradient reaches {name}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        _fail("no parameter is trained")


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


def _scale(trial: Trial) -> None:
    """The strength of an adapter, and the factor of a ``Rescales`` adapter, act on the output and on what is merged."""
    model, base = _same_each_time(trial), trial.output(trial.plain())
    trained = trial.output(model)
    model.manager.set_scale("default", 0.0)
    _check_near(trial.output(model), base, trial, "with a scale of 0")
    model.manager.set_scale("default", 1.0)
    _check_equal(trial.output(model), trained, "with a scale of 1 again the output is not bit-equal")
    for factor in (0.5, 2.0):
        scaled = _same_each_time(trial)
        adapters = [layer.adapter("default") for layer in scaled.manager.layers.values()]
        own = [adapter for adapter in adapters if isinstance(adapter, Rescales)]
        for adapter in own:
            adapter.rescale(factor * adapter.trained_scaling)
        found = trial.output(scaled)
        if own and float((found - trained).abs().max()) <= _NOTHING * float((trained - base).abs().max()):
            _fail(f"scaling times {factor:g} does not change the output: forward does not use self.scaling")
        if not own:
            scaled.manager.set_scale("default", factor)
            found = trial.output(scaled)
        with suppress(MergeError):
            scaled.merge_adapter()
            _check_near(trial.output(scaled), found, trial, f"merged, with the scaling times {factor:g}")


def _dropout(trial: Trial) -> None:
    """In training each dropout of the config changes the output; otherwise it changes nothing."""
    values = {name: getattr(trial.config, name) for name in trial.config.__dataclass_fields__ if "dropout" in name}
    fields = [name for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    if not fields:
        raise _NotPromised("the config has no field with dropout in its name")
    if any(layer.base.kind.takes_ids for layer in trial.fresh().manager.layers.values()):
        raise _NotPromised("the layer's input is ids, to which no dropout applies")
    for name in fields:
        plain = _same_each_time(trial.with_fields(**dict.fromkeys(fields, 0.0)))
        model = _same_each_time(trial.with_fields(**{**dict.fromkeys(fields, 0.0), name: 0.5}))
        for (own, found), expected in zip(_parameters(model).items(), _parameters(plain).values(), strict=True):
            _check_equal(found, expected, f"{name} changes how {own} starts")
        expected = trial.output(plain)
        _check_equal(trial.output(model), expected, f"{name} = 0.5 changes the output outside of training")
        plain.train()
        model.train()
        if all(torch.equal(_drawn(trial, model, seed), _drawn(trial, plain, seed)) for seed in range(_DRAWS)):
            _fail(f"{name} = 0.5 does not change the output in training")


def _same_each_time(trial: Trial) -> PeftModel:
    """A copy of the model with an adapter that has the same parameters in each of these copies."""
    with drawing_from(2):
        return trial.randomized()


def _drawn(trial: Trial, model: PeftModel, seed: int) -> Tensor:
    with drawing_from(seed):
        return trial.output(model)


def _merge(trial: Trial) -> None:
    """The merged model computes what the adapter computed; where merging is refused, the weights are as they were."""
    model = trial.randomized()
    expected, before = trial.output(model), _state(model)
    try:
        model.merge_adapter()
    except MergeError:
        _check_same_state(_state(model), before, "merging was refused, but the weights changed")
        raise
    _check_near(trial.output(model), expected, trial, "after merge_adapter()")
    base = model.merge_and_unload()
    if any(isinstance(module, Wrapper) for module in base.modules()):
        _fail("after merge_and_unload() the model still has adapted layers")
    _check_near(trial.output(base), expected, trial, "after merge_and_unload()")


def _unmerge(trial: Trial) -> None:
    """Unmerging restores every bit of the weights and of the output."""
    model = trial.randomized()
    expected, before = trial.output(model), _state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    _check_same_state(_state(model), before, "after unmerge_adapter()")
    _check_equal(trial.output(model), expected, "after unmerge_adapter() the output is not bit-equal")


def _save(trial: Trial) -> None:
    """A saved adapter that is loaded onto the base model has the same tensors and computes the same."""
    model = trial.randomized()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(trial.plain(), folder).eval()
    _check_same_state(_parameters(again), _parameters(model), "the loaded adapter")
    _check_near(trial.output(again), trial.output(model), trial, "the loaded adapter")


def _swap(trial: Trial) -> None:
    """A saved adapter takes the place of a loaded one, in the same memory, and computes as where it was saved."""
    model, other = trial.randomized(), trial.randomized()
    trial.output(model.eval())  # what is kept from here on would be of the former adapter
    places = [parameter.data_ptr() for parameter in model.manager.parameters("default")]
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder, "default")
    _check_same_state(_parameters(model), _parameters(other), "the adapter after a swap")
    _check_near(trial.output(model), trial.output(other.eval()), trial, "the adapter after a swap")
    if places != [parameter.data_ptr() for parameter in model.manager.parameters("default")]:
        _fail("a swap moves the parameters, which a compiled model would not notice")


def _copy(trial: Trial) -> None:
    """A copied or renamed adapter computes the same, and deleting one leaves the other and the base as they were."""
    model = trial.randomized()
    expected, manager = trial.output(model), model.manager
    before = _parameters(model)
    manager.copy("default", "twin")
    manager.rename("default", "renamed")
    _check_equal(trial.output(model), expected, "the renamed adapter's output is not bit-equal")
    with model.use("twin"):
        _check_equal(trial.output(model), expected, "the copied adapter's output is not bit-equal")
    randomize(model, "twin")
    _check_equal(trial.output(model), expected, "changing a copy of the adapter changes the adapter")
    manager.remove("twin")
    manager.rename("renamed", "default")
    _check_equal(trial.output(model), expected, "deleting a copy of the adapter changes the adapter's output")
    _check_same_state(_parameters(model), before, "deleting a copy of the adapter changes the adapter")


def _unload(trial: Trial) -> None:
    """Without its adapter the model is the base model again, bit for bit."""
    base = trial.plain()
    before, expected = _state(base), trial.output(base)
    model = get_peft_model(base, trial.own_config()).eval()
    randomize(model, "default")
    trial.output(model)
    plain = model.unload()
    _check_same_state(_state(plain), before, "after unload()")
    _check_equal(trial.output(plain), expected, "after unload() the output is not bit-equal to the base model's")


def _adapters(trial: Trial) -> None:
    """Two adapters do not affect each other, and together they add up in either order, merged or not."""
    model = trial.pair()
    alone = {name: _output_of(trial, model, name) for name in ("default", "other")}
    _check_equal(alone["default"], trial.output(model), "the active adapter is not the one that was selected")
    if torch.equal(alone["default"], alone["other"]):
        _fail("two adapters with different parameters compute the same")
    model.set_adapter(["default", "other"])
    together = trial.output(model.eval())
    model.set_adapter(["other", "default"])
    if not trial.config.learns_prompt:  # whose tokens follow each other in the order of the adapters
        _check_near(trial.output(model.eval()), together, trial, "two active adapters in the other order")
    with suppress(MergeError):
        model.merge_adapter()
        _check_near(trial.output(model), together, trial, "two merged adapters")
        model.unmerge_adapter()
    randomize(model, "default")
    _check_equal(_output_of(trial, model, "other"), alone["other"], "changing one adapter changes another one")


def _output_of(trial: Trial, model: PeftModel, name: str) -> Tensor:
    with model.use(name):
        return trial.output(model)


def _rows(trial: Trial) -> None:
    """In a mixed batch each row is computed as with its adapter alone."""
    model = trial.pair()
    names = ["default", "other", BASE_NAME][: trial.row_count]
    names += ["default"] * (trial.row_count - len(names))
    found = trial.output(model, adapter_names=names)
    for number, name in enumerate(names):
        row = slice(number, number + 1)
        with model.disable_adapter() if name == BASE_NAME else model.use(name):
            expected = trial.output(model, row)
        aligned = found[row, -expected.shape[1] :] if trial.config.learns_prompt else found[row]  # padded on the left
        _check_near(aligned, expected, trial, f"row {number} of a mixed batch")


def _bfloat16(trial: Trial) -> None:
    """On a bfloat16 model it computes and learns in bfloat16, with parameters in float32 or bfloat16."""
    half = trial.in_dtype(torch.bfloat16)
    for cast in (True, False):
        model = get_peft_model(half.plain(), half.own_config(), autocast_adapter_dtype=cast).train()
        randomize(model, "default")
        output = half.call(model)
        if output.dtype != torch.bfloat16:
            _fail(f"the output is {output.dtype}, that of the base model torch.bfloat16")
        torch.autograd.backward(output.float().square().sum())
        if not all(_has_gradient(parameter) for parameter in model.parameters() if parameter.requires_grad):
            _fail("a gradient is missing or not finite")


def _quantized(trial: Trial) -> None:
    """On a base in 4 bits it computes what it computes on the weights that these stand for, and it learns."""
    try:
        quantized, twin = trial.in_four_bits()
    except MissingPackageError as missing:
        raise _NotPromised(f"not run: {missing}") from missing
    if quantized is None:
        raise _NotPromised("the model has no linear layer that could be quantized")
    model = get_peft_model(quantized, trial.own_config()).eval()
    randomize(model, "default")
    found = trial.output(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dense = PeftModel.from_pretrained(twin, folder).eval()
    _check_near(found, trial.output(dense), trial, "on a base in 4 bits, compared with its dequantized weights")
    torch.autograd.backward(trial.call(model.train()).float().square().sum())
    if not all(_has_gradient(parameter) for parameter in model.parameters() if parameter.requires_grad):
        _fail("on a base in 4 bits a gradient is missing or not finite")


def _deepcopy(trial: Trial) -> None:
    """A deep copy computes the same, and is independent."""
    model = trial.randomized()
    _check_twin(trial, model, copy.deepcopy(model), "copy.deepcopy()")


def _pickle(trial: Trial) -> None:
    """A pickled model computes the same, and is independent."""
    try:
        pickle.dumps(trial.base)
    except Exception as error:
        raise _NotPromised(f"the model without adapters cannot be pickled: {_reason(error)}") from None
    model = trial.randomized()
    _check_twin(trial, model, pickle.loads(pickle.dumps(model)), "pickle")


def _check_twin(trial: Trial, model: PeftModel, twin: PeftModel, how: str) -> None:
    expected = trial.output(model)
    _check_equal(trial.output(twin), expected, f"the output after {how} is not bit-equal")
    randomize(twin, "default")
    _check_equal(trial.output(model), expected, f"changing the adapter after {how} changes the original")
    if torch.equal(trial.output(twin), expected):
        _fail(f"after {how} the adapter no longer depends on its own parameters")


@dataclass(frozen=True)
class _Check:
    """A check: its name, the function, and the errors with which a method may refuse it."""

    name: str
    run: Callable[[Trial], None]
    refusals: tuple[type[NbpeftError], ...] = ()


_CHECKS = (
    _Check("injection", _injection, (NbpeftError,)),
    _Check("config", _config),
    _Check("rollback", _rollback),
    _Check("identity", _identity),
    _Check("gradients", _gradients),
    _Check("scale", _scale, (NbpeftError,)),
    _Check("dropout", _dropout, (ConfigError,)),
    _Check("merge", _merge, (MergeError,)),
    _Check("unmerge", _unmerge, (MergeError,)),
    _Check("save", _save),
    _Check("swap", _swap, (HotSwapError,)),
    _Check("copy", _copy),
    _Check("unload", _unload),
    _Check("adapters", _adapters, (NbpeftError,)),
    _Check("rows", _rows, (NbpeftError,)),
    _Check("bfloat16", _bfloat16, (ConfigError,)),
    _Check("quantized", _quantized, (NbpeftError,)),
    _Check("deepcopy", _deepcopy),
    _Check("pickle", _pickle),
)
