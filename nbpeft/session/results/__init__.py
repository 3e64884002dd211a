"""Results of commands: frozen data, displayed as a line in a terminal and as a card in a notebook.

A displayed result keeps no tensor alive, so that a notebook's ``Out`` only has numbers and names.
"""

from __future__ import annotations

from nbpeft.session.results.adapters import AddResult as AddResult
from nbpeft.session.results.adapters import CommandResult as CommandResult
from nbpeft.session.results.adapters import LoadResult as LoadResult
from nbpeft.session.results.adapters import MemoryReport as MemoryReport
from nbpeft.session.results.adapters import RestoreResult as RestoreResult
from nbpeft.session.results.adapters import SavedAdapter as SavedAdapter
from nbpeft.session.results.adapters import SaveResult as SaveResult
from nbpeft.session.results.adapters import StatusReport as StatusReport
from nbpeft.session.results.adapters import UnloadResult as UnloadResult
from nbpeft.session.results.base import LineResult as LineResult
from nbpeft.session.results.base import ModelRef as ModelRef
from nbpeft.session.results.base import Notice as Notice
from nbpeft.session.results.base import Result as Result
from nbpeft.session.results.combining import CombineResult as CombineResult
from nbpeft.session.results.combining import SwapResult as SwapResult
from nbpeft.session.results.comparing import CompareResult as CompareResult
from nbpeft.session.results.converting import ConvertResult as ConvertResult
from nbpeft.session.results.data import DataResult as DataResult
from nbpeft.session.results.doctor import Check as Check
from nbpeft.session.results.doctor import DoctorReport as DoctorReport
from nbpeft.session.results.inspecting import InspectResult as InspectResult
from nbpeft.session.results.merging import MergedCopy as MergedCopy
from nbpeft.session.results.methods import MethodsResult as MethodsResult
from nbpeft.session.results.planning import PlanResult as PlanResult
from nbpeft.session.results.preview import Preview as Preview
from nbpeft.session.results.preview import PreviewRow as PreviewRow
from nbpeft.session.results.quantizing import QloraPreview as QloraPreview
from nbpeft.session.results.quantizing import QloraResult as QloraResult
from nbpeft.session.results.shipping import PushResult as PushResult
from nbpeft.session.results.shipping import ShipResult as ShipResult
from nbpeft.session.results.training import ExportResult as ExportResult
