"""Lets modules that moved be imported by their former names.

Models pickled by nbpeft 0.2, and packages written for it, refer to these names.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_ROOMS = {
    "engine.contract": (
        "adapter adapter_site adapter_weights allocator base combination field_types initial_draws loss_terms "
        "model_adapter peft_types provider registry shared_state trained training_hooks weight_delta"
    ),
    "engine.config": "adapter_names config_checks layers_config module_paths patterns prompt_config targets",
    "engine.changes": "active_state random_numbers transaction",
    "engine.wrappers": ("composite_layer factored_weight layer merge_checks modules_to_save parameter_layer row_order"),
    "engine.tree": "adapted_tree fused_layers model_tree parameter_targets tied_weights",
    "engine.injection": "biases build config_warnings custom_layers plan replication",
    "engine.runtime": "adapter_tensors layer_commands manager merging method_hooks renaming scopes",
    "engine.calls": (
        "cached_prefix first_pass inner_calls model_calls prepared_calls prompt_twins selective_recompute "
        "side_network task_ids token_prompt two_pass_cache"
    ),
    "engine.kernels": (
        "four_bit grouped_heads live_parameters numerics quantized_matrices recomputed rounding storage"
    ),
    "engine.methods.products": "loha lokr hira gralora glora lily miss peanut delora poly c3a",
    "engine.methods.rotations": "oft boft hra psoft road",
    "engine.methods.projections": "vera pvera randlora vblora unilora tinylora frod adamss osf deft",
    "engine.methods.entries": "shira supertuning fourierft waveft",
    "engine.methods.vectors": "ia3 ln_tuning beft trainable_tokens",
    "engine.methods.prompts": (
        "prompt_tuning p_tuning prefix_tuning multitask_prompt_tuning cpt cartridge adaption_prompt"
    ),
    "engine.methods.lora.variants": (
        "adalora alora arrow bdlora dora kasa mica monteclora qalora velora xlora xlora_classifier xlora_config"
    ),
    "engine.methods.lora.initialization": "decompositions gradients incremental_pca inits loftq",
    "model.handle": (
        "arrow auto functional helpers injection peft_model prompts serving state_dicts status tasks tuner"
    ),
    "model.saving": "files given_configs merge_deltas merge_export merge_weights residuals saved_places sharded",
    "model.combine": "combining conversion",
    "model.quantization": "quantize quantized_experts weight_storage",
    "model.from_data": "calibrated_merge cartridges data_inits eva eva_search loftq observing start_from_rows",
    "model.analysis": "inspection intruders kappa method_facts",
    "model.swapping": "device_cache host_cache hotswap pool",
    "training.adapters": "extra_loss learning_check method_state optimizer_steps snapshot",
    "training.disk": "agreement checkpoint_damage checkpoints kept_arguments save_now sharded_trainer",
    "training.monitor": "callback control failures record result run tracebacks",
    "training.transformers": "adapter_mixins argument_source arguments import_hook trainer trainer_patch",
    "training.watching": "divergence early_stop generation sampling trackers",
    "training.loop": "grouping packing prepare rows",
    "_util": "device_names hooks host_memory hub_access interrupts lazy logs optional subscribers",
}
"""Package -> its modules that used to be in the parent package."""
_ELSEWHERE = {
    "engine.peft_layer_api": "peft_layers.layers",
    "engine.peft_modules": "engine.views.part_modules",
    "engine.methods.lora.custom_layers": "peft_layers.lora_layers",
    "engine.projected_vectors": "engine.methods.projections.projected_vectors",
    "engine.kept": "engine.runtime.snapshots",
    "engine.spool": "engine.changes.spill_file",
    "engine.turns": "engine.changes.step_gate",
    "engine.reached": "engine.changes.called_modules",
    "engine.unadaptable": "engine.injection.injection_checks",
    "engine.nearest_levels": "engine.kernels.nf4_rounding",
    "engine.merged_twin": "engine.wrappers.fake_quant",
    "engine.fast_paths": "engine.injection.encoder_fast_paths",
    "training.keeping": "training.monitor.run_checkpointer",
    "training.fit": "training.loop.train",
    "training.adapted": "training.adapters.adapted_model",
}
"""Former name -> current name of modules that were also renamed."""

_CLASSES = {
    "Active": "ActiveAdapters",
    "KeptAdapter": "AdapterSnapshot",
    "MergedTwin": "FakeQuantLayer",
    "NONE_ACTIVE": "NO_ADAPTERS",
    "PeftLayerMixin": "AdaptedLayer",
    "Rows": "RowAssignment",
    "Stored": "WeightBackup",
}
"""What models refer to, or copies of their adapters, that has another name now."""


def new_name(module: str) -> str | None:
    """Returns the current name of a module.

    Args:
        module: its former full name, e.g. ``nbpeft.engine.layer``.

    Returns:
        Its current full name, e.g. ``nbpeft.engine.wrappers.layer``; None for a module that never moved.
    """
    package, _, place = module.partition(".")
    if package != _PACKAGE:
        return None
    folder, _, name = place.rpartition(".")
    for room, names in _ROOMS.items():
        if room.rpartition(".")[0] == folder and name in names.split():
            return f"{package}.{room}.{name}"
    return f"{package}.{_ELSEWHERE[place]}" if place in _ELSEWHERE else None


class FormerModules:
    """A meta path finder and loader for former names; a former module forwards to the current one.

    It does not derive from the classes of ``importlib.abc``, whose import takes a third as long as that of nbpeft.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module that moved; None for any other.

        Args:
            fullname: full name of the module.
            path: unused.
            target: unused.
        """
        return ModuleSpec(fullname, self) if new_name(fullname) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns None, so that Python creates the module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Makes the module forward attribute access to its successor, with a DeprecationWarning."""
        successor = str(new_name(module.__name__))
        warnings.warn(f"{module.__name__} is {successor} now", DeprecationWarning, stacklevel=2)
        moved = importlib.import_module(successor)

        def find(name: str) -> Any:
            if name.startswith("__"):  # inspect asks every module for such names
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(moved, _CLASSES.get(name, name))

        module.__doc__ = f"``{successor}`` under its former name."
        module.__dict__.update(__getattr__=find, __dir__=lambda: dir(moved))


def add_former_names() -> None:
    """Installs the finder for former names at the end of ``sys.meta_path``, so that it is asked last."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(FormerModules())
