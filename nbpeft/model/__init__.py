"""PEFT's face over the engine and the files: the names its users know."""

from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.adapter import PeftType as PeftType
from nbpeft.engine.contract.adapter import TaskType as TaskType
from nbpeft.engine.contract.registry import methods_of_type
from nbpeft.engine.methods.lora.config import LoraConfig as LoraConfig
from nbpeft.engine.methods.lora.config import LoraRuntimeConfig as LoraRuntimeConfig
from nbpeft.engine.methods.lora.init_configs import CordaConfig as CordaConfig
from nbpeft.engine.methods.lora.init_configs import EvaConfig as EvaConfig
from nbpeft.engine.methods.lora.init_configs import LoftQConfig as LoftQConfig
from nbpeft.engine.methods.lora.init_configs import LoraGAConfig as LoraGAConfig
from nbpeft.engine.methods.lora.variant_configs import ArrowConfig as ArrowConfig
from nbpeft.engine.methods.lora.variant_configs import BdLoraConfig as BdLoraConfig
from nbpeft.engine.methods.lora.variant_configs import KasaConfig as KasaConfig
from nbpeft.engine.methods.lora.variant_configs import MontecloraConfig as MontecloraConfig
from nbpeft.engine.methods.lora.variant_configs import VeloraConfig as VeloraConfig
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper as ModulesToSaveWrapper
from nbpeft.model.analysis.intruders import reduce_intruder_dimension as reduce_intruder_dimension
from nbpeft.model.analysis.kappa import KappaTuneSelector as KappaTuneSelector
from nbpeft.model.analysis.kappa import find_kappa_target_modules as find_kappa_target_modules
from nbpeft.model.analysis.method_checks import check_method as check_method
from nbpeft.model.analysis.method_report import MethodCheck as MethodCheck
from nbpeft.model.analysis.method_report import MethodReport as MethodReport
from nbpeft.model.combine.combining import Combined as Combined
from nbpeft.model.combine.conversion import convert_to_lora as convert_to_lora
from nbpeft.model.combine.conversion import save_as_lora as save_as_lora
from nbpeft.model.from_data.calibrated_merge import CalibratedMerge as CalibratedMerge
from nbpeft.model.from_data.calibrated_merge import merge_calibrated as merge_calibrated
from nbpeft.model.from_data.cartridges import compose_cartridge_adapters as compose_cartridge_adapters
from nbpeft.model.from_data.cartridges import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from nbpeft.model.from_data.cartridges import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from nbpeft.model.from_data.cartridges import (
    prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values,
)
from nbpeft.model.from_data.data_inits import preprocess_corda as preprocess_corda
from nbpeft.model.from_data.data_inits import preprocess_loraga as preprocess_loraga
from nbpeft.model.from_data.eva import get_eva_state_dict as get_eva_state_dict
from nbpeft.model.from_data.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from nbpeft.model.from_data.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
from nbpeft.model.handle.arrow import create_arrow_model as create_arrow_model
from nbpeft.model.handle.auto import AutoPeftModel as AutoPeftModel
from nbpeft.model.handle.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from nbpeft.model.handle.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from nbpeft.model.handle.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from nbpeft.model.handle.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from nbpeft.model.handle.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from nbpeft.model.handle.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from nbpeft.model.handle.functional import DoraCaching as DoraCaching
from nbpeft.model.handle.functional import cast_adapter_dtype as cast_adapter_dtype
from nbpeft.model.handle.functional import cast_mixed_precision_params as cast_mixed_precision_params
from nbpeft.model.handle.functional import delete_adapter as delete_adapter
from nbpeft.model.handle.functional import get_peft_config as get_peft_config
from nbpeft.model.handle.functional import set_adapter as set_adapter
from nbpeft.model.handle.functional import set_requires_grad as set_requires_grad
from nbpeft.model.handle.helpers import MontecloraTrainerMixin as MontecloraTrainerMixin
from nbpeft.model.handle.helpers import check_if_peft_model as check_if_peft_model
from nbpeft.model.handle.helpers import disable_input_dtype_casting as disable_input_dtype_casting
from nbpeft.model.handle.helpers import rescale_adapter_scale as rescale_adapter_scale
from nbpeft.model.handle.helpers import update_forward_signature as update_forward_signature
from nbpeft.model.handle.helpers import update_generate_signature as update_generate_signature
from nbpeft.model.handle.helpers import update_signature as update_signature
from nbpeft.model.handle.injection import inject_adapter_in_model as inject_adapter_in_model
from nbpeft.model.handle.peft_model import PeftModel as PeftModel
from nbpeft.model.handle.state_dicts import get_base_model_state_dict as get_base_model_state_dict
from nbpeft.model.handle.state_dicts import get_peft_model_state_dict as get_peft_model_state_dict
from nbpeft.model.handle.state_dicts import load_peft_weights as load_peft_weights
from nbpeft.model.handle.state_dicts import set_base_model_state_dict as set_base_model_state_dict
from nbpeft.model.handle.state_dicts import set_peft_model_state_dict as set_peft_model_state_dict
from nbpeft.model.handle.status import LayerStatus as LayerStatus
from nbpeft.model.handle.status import ModelStatus as ModelStatus
from nbpeft.model.handle.status import get_layer_status as get_layer_status
from nbpeft.model.handle.status import get_model_status as get_model_status
from nbpeft.model.handle.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from nbpeft.model.handle.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from nbpeft.model.handle.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from nbpeft.model.handle.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from nbpeft.model.handle.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from nbpeft.model.handle.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
from nbpeft.model.handle.tasks import get_peft_model as get_peft_model
from nbpeft.model.handle.tuner import BaseTuner, tuner_class
from nbpeft.model.quantization.quantize import load_quantized as load_quantized
from nbpeft.model.quantization.quantize import quantize_model as quantize_model
from nbpeft.model.saving.merge_export import MergedFolder as MergedFolder
from nbpeft.model.saving.merge_export import MergedTensors as MergedTensors
from nbpeft.model.saving.merge_export import merge_errors as merge_errors
from nbpeft.model.saving.merge_export import merge_to_folder as merge_to_folder
from nbpeft.model.saving.merge_export import merged_tensors as merged_tensors
from nbpeft.model.swapping.hotswap import hotswap_adapter as hotswap_adapter
from nbpeft.model.swapping.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
from nbpeft.model.swapping.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
from nbpeft.model.swapping.pool import AdapterPool as AdapterPool
from nbpeft.model.swapping.pool import PoolStatistics as PoolStatistics
from nbpeft.peft_layers.lora_layers import LoraLayer as LoraLayer

PeftConfig = AdapterConfig
LoraModel: type[BaseTuner] = tuner_class(methods_of_type("LORA")[0])
AdaptionPromptModel: type[BaseTuner] = tuner_class(methods_of_type("ADAPTION_PROMPT")[0])
