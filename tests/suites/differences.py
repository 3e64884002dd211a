"""Why tests of PEFT's that pass with PEFT do not pass with nbpeft: the kinds, and what they are in each file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

KINDS = {
    "wording": r"Regex pattern did not match|<ExceptionInfo|startswith of str"
    r"|DID NOT WARN[^[]*Emitted warnings: \[[^]]|False = _is_warn_triggered\(\[<"
    r"|^\S*test_from_pretrained_missing_keys_warning",
    "works here, PEFT refuses": r"DID NOT RAISE|supports_lora_conversion\(\)|^\S*test_warning_naming_conflict",
    "the base stays as it is": r"with_other_adapter_warns|kasa_truncation_changes_base"
    r"|conversion_same_output\S*\s+(AssertionError: )?assert (not True|16 == 8)",
    "no warning": r"DID NOT WARN|WarningsRecorder|warn\w*(\[.*\])?\nassert False",
    "missing": r"(?<!\w)[A-Za-z]\w* is not available: nbpeft does not implement",
    "PEFT's internals": r"AttributeError|does not have the attribute"
    r"|router layer not found|test_mixin_adds_variational_loss"
    r"|1 = len\(\{<class|tensor\([^=]*\) is tensor\(|data_ptr|KeyError|\nassert \[\]",
    "refused here": r"\nnbpeft\.errors",
    "did not run": r"\ndid not run|Timeout",
}
"""A kind of difference -> what the test's name and the failure's message say; the first that fits."""
OF_TESTS = ("wording", "works here, PEFT refuses", "the base stays as it is", "PEFT's internals")
"""Kinds that are not about what a model computes. They are told by messages alone: read those in ``artifacts``."""
OTHER = "other"

WHY = {
    "adaption_prompt": "`_active_adapter` of the base model",
    "arrow": "no layer type of its own",
    "cartridge": "a patched function of `peft.peft_model`",
    "config": "a patched `peft.config.__version__`; warnings of unknown fields",
    "custom_models": "`disable_adapter()` leaves `requires_grad`; no sampler modules of MonteCLoRA",
    "decoder_models": "two adapters with biases, prompts unloaded; AdaLoRA converts to LoRA",
    "deft": "a cache of merging",
    "encoder_decoder_models": "positional arguments of `generate`; two adapters with biases",
    "feature_extraction_models": "prefix tuning of DeBERTa is refused at once",
    "frod": "each adapter has its own tensors; a patched matrix product",
    "helpers": "DoRA's caches and MonteCLoRA's samplers are no modules; mixed dtypes compute",
    "initialization": "OLoRA, PiSSA and KaSA leave the base as it is; prefix tuning of a model without a cache",
    "integrations": "a patched `ParamWrapper.update_layer`",
    "lora_conversion": "(IA)³, LoKr and KaSA convert",
    "lora_variants": "variants are no classes on layers; beams with aLoRA work",
    "lorafa": "a patched function",
    "low_level_api": "methods that share state are injected without a handle",
    "mixed": "two adapters on a layer are one layer here",
    "multitask_prompt_tuning": "one task needs no `task_ids`",
    "osf": "unmerging OSF",
    "pvera": "each adapter has its own projections, of any seed",
    "randlora": "each adapter has its own bases, of any seed",
    "seq_classifier": "AdaLoRA's regularization is in the training loss alone",
    "shira": "a patched warning",
    "target_parameters": "mixed batches and two adapters with biases; a private proxy class",
    "trainable_tokens": "overlapping tokens are merged; tied layers need the same tokens",
    "tuners_utils": "states put in by hand; status of prompts and mixed models",
    "vblora": "training goes on from top-k weights",
    "velora": "its projection is no settable attribute",
    "vera": "each adapter has its own projections, of any seed",
    "xlora": "a static method of its layer",
}
"""A file -> what differs in it."""


def kinds_of(failures: Iterable[str]) -> Counter[str]:
    """How many failures, name and message of each, are of each kind."""
    return Counter(
        next((kind for kind, said in KINDS.items() if re.search(said, failure)), OTHER) for failure in failures
    )


def told(file: str, kinds: Counter[str]) -> str:
    """How many failures of a file are of each kind, and what they are.

    Args:
        file: its name, ``test_`` left out.
        kinds: of its failures.
    """
    counts = "; ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    return f"{counts} ({WHY[file]})" if counts and WHY.get(file) else counts
