"""Plans a config on a model and counts what ``add`` would do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbpeft.session.configs import label_of
from nbpeft.session.results.preview import Preview, PreviewRow

if TYPE_CHECKING:
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.injection.plan import InjectionPlan, Target

_ADAMW_BYTES = 2
"""Moments that AdamW keeps, each as large as the parameter."""


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
    """Counts what an adapter on a model would be; the model is not touched.

    Args:
        base: the base model.
        wanted: config of the adapter to come, or a plan made of it.
        name: of the adapter to come.
        model_name: what the model is called.
        replaces: whether an adapter of that name is there.
        notes: put into the preview.
        stored: how targets will be stored by then, by path, where that is not how they are now.
    """
    from nbpeft.engine.injection.plan import InjectionPlan, plan
    from nbpeft.engine.tree.model_tree import parameter_counts

    made = wanted if isinstance(wanted, InjectionPlan) else plan(base, wanted, replacing=name if replaces else None)
    return Preview(
        model_name=model_name,
        name=name,
        method=label_of(made.config),
        rows=_rows(made.targets, made.config, stored or {}),
        copies=tuple(made.copies),
        excluded_count=len(made.excluded),
        missing=made.missing,
        parameter_count=made.parameter_count,
        base_count=parameter_counts(base)[1],
        byte_count=made.byte_count,
        training_bytes=made.byte_count * (1 + _ADAMW_BYTES),
        frozen_bytes=made.frozen_byte_count,
        replaces=replaces,
        notes=tuple(note for note in notes if not made.missing or "match" not in note),
    )


def _rows(targets: tuple[Target, ...], config: Any, stored: Mapping[str, str]) -> tuple[PreviewRow, ...]:
    """Targets by last path segment, in model order."""
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
    """``out × in``, of experts with their number before it."""
    shape = f"{target.out_features} × {target.in_features}"
    return shape if target.matrix_count == 1 else f"{target.matrix_count} × {shape}"


def _size(target: Target) -> int | None:
    """The rank, for experts that of each."""
    size: int | None = target.config.size if target.is_bare else target.adapter_class.size_of(target.shapes)
    return size
