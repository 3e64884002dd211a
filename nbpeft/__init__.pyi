"""The public names, each written once: what editors and type checkers see, and what ``__init__.py`` resolves.

Configs of methods need no line here to be found; one makes editors know them.
"""

from typing import Any

from .errors import AdapterError as AdapterError
from .errors import AdapterExistsError as AdapterExistsError
from .errors import BaseMismatchError as BaseMismatchError
from .errors import BusyError as BusyError
from .errors import CellError as CellError
from .errors import CheckpointError as CheckpointError
from .errors import CheckpointNotFoundError as CheckpointNotFoundError
from .errors import ConfigError as ConfigError
from .errors import CorruptCheckpointError as CorruptCheckpointError
from .errors import HotSwapError as HotSwapError
from .errors import LayerKindError as LayerKindError
from .errors import MergeError as MergeError
from .errors import NbpeftError as NbpeftError
from .errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from .errors import PeftError as PeftError
from .errors import PeftWarning as PeftWarning
from .errors import StaleModelError as StaleModelError
from .errors import TargetError as TargetError
from .errors import TrainingError as TrainingError
from .errors import UnknownAdapterError as UnknownAdapterError
from .errors import UnknownMethodError as UnknownMethodError
from .memory import Forecast as Forecast
from .memory import forecast as forecast
from .model import AdapterPool as AdapterPool
from .model import AutoPeftModel as AutoPeftModel
from .model import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from .model import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from .model import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from .model import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from .model import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from .model import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from .model import DoraCaching as DoraCaching
from .model import LayerStatus as LayerStatus
from .model import LoraConfig as LoraConfig
from .model import LoraLayer as LoraLayer
from .model import LoraRuntimeConfig as LoraRuntimeConfig
from .model import ModelStatus as ModelStatus
from .model import ModulesToSaveWrapper as ModulesToSaveWrapper
from .model import PeftConfig as PeftConfig
from .model import PeftModel as PeftModel
from .model import PeftModelForCausalLM as PeftModelForCausalLM
from .model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from .model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from .model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from .model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from .model import PeftModelForTokenClassification as PeftModelForTokenClassification
from .model import PeftType as PeftType
from .model import TaskType as TaskType
from .model import cast_adapter_dtype as cast_adapter_dtype
from .model import cast_mixed_precision_params as cast_mixed_precision_params
from .model import check_if_peft_model as check_if_peft_model
from .model import delete_adapter as delete_adapter
from .model import disable_input_dtype_casting as disable_input_dtype_casting
from .model import get_base_model_state_dict as get_base_model_state_dict
from .model import get_layer_status as get_layer_status
from .model import get_model_status as get_model_status
from .model import get_peft_config as get_peft_config
from .model import get_peft_model as get_peft_model
from .model import get_peft_model_state_dict as get_peft_model_state_dict
from .model import hotswap_adapter as hotswap_adapter
from .model import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
from .model import inject_adapter_in_model as inject_adapter_in_model
from .model import load_peft_weights as load_peft_weights
from .model import load_quantized as load_quantized
from .model import merge_errors as merge_errors
from .model import merge_to_folder as merge_to_folder
from .model import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
from .model import quantize_model as quantize_model
from .model import rescale_adapter_scale as rescale_adapter_scale
from .model import set_adapter as set_adapter
from .model import set_base_model_state_dict as set_base_model_state_dict
from .model import set_peft_model_state_dict as set_peft_model_state_dict
from .model import set_requires_grad as set_requires_grad
from .model import update_forward_signature as update_forward_signature
from .model import update_generate_signature as update_generate_signature
from .model import update_signature as update_signature
from .session import Session as Session
from .session import session as session
from .session import track as track
from .state import AdapterState as AdapterState
from .state import MemoryState as MemoryState
from .state import ModelState as ModelState
from .state import SessionState as SessionState
from .state import TrainState as TrainState
from .training import Run as Run
from .training import RunCallback as RunCallback
from .training import RunControl as RunControl
from .training import Trainer as Trainer
from .training import TrainResult as TrainResult
from .training import adapter_trainer as adapter_trainer
from .training import create_lorafa_optimizer as create_lorafa_optimizer
from .training import create_loraplus_optimizer as create_loraplus_optimizer
from .training import patch_trainer as patch_trainer
from .training import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .training import train as train
from .training import unpatch_trainer as unpatch_trainer

__version__: str

def load_ipython_extension(shell: Any) -> None: ...
def unload_ipython_extension(shell: Any) -> None: ...
