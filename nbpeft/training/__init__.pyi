"""The names of the package, each written once; ``__init__.py`` resolves them."""

from ..engine.methods.lora.optimizers import LoraFAOptimizer as LoraFAOptimizer
from ..engine.methods.lora.optimizers import create_lorafa_optimizer as create_lorafa_optimizer
from ..engine.methods.lora.optimizers import create_loraplus_optimizer as create_loraplus_optimizer
from ..engine.methods.lora.optimizers import create_riemannian_optimizer as create_riemannian_optimizer
from .data import Collator as Collator
from .data import is_plain as is_plain
from .data import open_data as open_data
from .data import prepare_data as prepare_data
from .data import summarize as summarize
from .loop.prepare import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .loop.train import train as train
from .monitor.callback import RunCallback as RunCallback
from .monitor.control import RunControl as RunControl
from .monitor.result import TrainResult as TrainResult
from .monitor.run import Run as Run
from .monitor.run import start_run as start_run
from .script import export_script as export_script
from .script import unfinished_run as unfinished_run
from .sweep.result import SweepResult as SweepResult
from .transformers.trainer import Trainer as Trainer
from .transformers.trainer import adapter_trainer as adapter_trainer
from .transformers.trainer_patch import patch_trainer as patch_trainer
from .transformers.trainer_patch import unpatch_trainer as unpatch_trainer
