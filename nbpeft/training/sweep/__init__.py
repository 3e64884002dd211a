"""Many trainings at once: adapters that learn side by side over one frozen base, each as if it trained alone.

fit.train ── @side_by_side ──> adapters.py     makes the adapters, chooses the best, undoes
    └── SideBySide, in members.py              the adapters and how each does
        └── SideBySideTrainer, in trainer.py   rows, loss, clipping, schedule and evaluation of each
            └── SplitLoss, in loss.py          the loss of a mixed batch, member by member
"""

from nbpeft.training.sweep.adapters import side_by_side as side_by_side
from nbpeft.training.sweep.members import SideBySide as SideBySide
from nbpeft.training.sweep.members import kept_of as kept_of
from nbpeft.training.sweep.result import SweepResult as SweepResult
from nbpeft.training.sweep.trainer import SideBySideCallback as SideBySideCallback
from nbpeft.training.sweep.trainer import callbacks_of as callbacks_of
