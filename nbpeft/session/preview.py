"""Planning a config on a model, and counting what ``add`` would do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbpeft.session.configs import label_of
from nbpeft.session.results.preview import Preview, PreviewRow

if TYPE_CHECKING:
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.injection.injection_plan import InjectionPlan, Target

_ADAMW_BYTES = 2
"""Number of AdamW's moments, each of the size of the parameter."""


def preview_of(
    base: Any,
    wanted: AdapterConfig | InjectionPlan,
    *,
    name: str,
    model_name: str,
    replaces: bool,
    notes: list[str],
    stored: Mapping[str, str] | None = None,
) -> Preview:
    """Counts the parts of a new adapter; the model is not changed.

    Args:
        base: the base model.
        wanted: config of the new adapter, or its plan.
        name: name of the new adapter.
        model_name: name of the model.
        replaces: whether there is an adapter with that name.
        notes: notes for the preview.
        stored: path -> backend of layers that will be quantized first.
    """
    from nbpeft.engine.injection.injection_plan import InjectionPlan
    from nbpeft.engine.injection.plan import plan
    from nbpeft.engine.tree.model_tree import parameter_counts

    planned = wanted if isinstance(wanted, InjectionPlan) else plan(base, wanted, replacing=name if replaces else None)
    return Preview(
        model_name=model_name,
        name=name,
        method=label_of(planned.config),
        rows=_rows(planned.targets, planned.config, stored or {}),
        copies=tuple(planned.copies),
        excluded_count=len(planned.excluded),
        missing=planned.missing,
        parameter_count=planned.parameter_count,
        base_count=parameter_counts(base)[1],
        byte_count=planned.byte_count,
        training_bytes=planned.byte_count * (1 + _ADAMW_BYTES),
        frozen_bytes=planned.frozen_byte_count,
        replaces=replaces,
        notes=tuple(note for note in notes if not planned.missing or "match" not in note),
    )


def _rows(targets: tuple[Target, ...], config: Any, stored: Mapping[str, str]) -> tuple[PreviewRow, ...]:
    """Returns the targets grouped by the last component of their paths, in model order."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.path.rpartition(".")[2], []).append(target)
    return tuple(
        PreviewRow(
            target=segment,
            module_count=len(group),
            shapes=tuple(dict.fromkeys(_shape(item) for item in group)),
            ranks=tuple(sorted({size for item in group if (size := _size(item))})),
            parameter_count=sum(item.parameter_count for item in group),
            backend=", ".join(dict.fromkeys(stored.get(item.path, item.backend) for item in group)),
        )
        for segment, group in groups.items()
    )


def _shape(target: Target) -> str:
    """Returns ``out × in``, preceded by the number of experts if there are several."""
    shape = f"{target.out_features} × {target.in_features}"
    return shape if target.matrix_count == 1 else f"{target.matrix_count} × {shape}"


def _size(target: Target) -> int | None:
    """Returns the rank; for experts, the rank of each."""
    from nbpeft.engine.contract.adapter import size_of

    size: int | None = target.config.adapter_size if target.is_bare else size_of(target.adapter_class, target.shapes)
    return size
