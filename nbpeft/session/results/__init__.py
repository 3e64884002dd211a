"""What commands return: frozen data, a line in a terminal and a card in a notebook.

A result never keeps a tensor alive once it was shown: what a notebook keeps in ``Out`` is numbers and names.
"""

from __future__ import annotations

from nbpeft.session.results.adapters import (
    AddResult,
    Done,
    LoadResult,
    MemoryReport,
    SavedAdapter,
    SaveResult,
    StatusReport,
    UnloadResult,
)
from nbpeft.session.results.base import ModelRef, Result
from nbpeft.session.results.combining import CombineResult, SwapResult
from nbpeft.session.results.comparing import CompareResult
from nbpeft.session.results.doctor import Check, DoctorReport
from nbpeft.session.results.inspecting import InspectResult
from nbpeft.session.results.merging import MergedCopy
from nbpeft.session.results.planning import PlanResult
from nbpeft.session.results.preview import Preview, PreviewRow
from nbpeft.session.results.quantizing import QloraPreview, QloraResult
from nbpeft.session.results.runs import ExportResult

__all__ = [
    "AddResult",
    "Check",
    "CombineResult",
    "CompareResult",
    "DoctorReport",
    "Done",
    "ExportResult",
    "InspectResult",
    "LoadResult",
    "MemoryReport",
    "MergedCopy",
    "ModelRef",
    "PlanResult",
    "Preview",
    "PreviewRow",
    "QloraPreview",
    "QloraResult",
    "Result",
    "SaveResult",
    "SavedAdapter",
    "StatusReport",
    "SwapResult",
    "UnloadResult",
]
