"""The table of PEFT's modules, the names in each of them, and the module of nbpeft that implements each name.

It has all public names of the packages of PEFT 0.21.2, and those private ones that other libraries import.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from nbpeft.peft_api.missing import missing

_ROOT = __name__.partition(".")[0]

# Origin of a name: a module of nbpeft.peft_api, or one of these.
OWN = "nbpeft"
"""A public name of nbpeft, or a class of a registered method; if there is no such name, it is missing."""
LAYER = "layer"
"""A class for ``isinstance`` checks of layers with adapters of one method, e.g. ``lora.Linear``."""

_AUTO = (
    "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
    "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"
)
_MODELS = (
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
    "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification "
    "get_layer_status get_model_status"
)
_STATE_DICTS = (
    "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict "
    "set_peft_model_state_dict"
)
_MAPPINGS = "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING"
_ADAPTER_FUNCTIONS = "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"
_LORA_EXTRAS = (
    "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig MontecloraConfig VeloraConfig "
    "create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga"
)
_CARTRIDGE_FUNCTIONS = (
    "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values"
)
_PREFIX_POSTPROCESSING = (
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value"
)
_STARCODER = "starcoder_model_postprocess_past_key_value"
_CONSTANTS = (
    "ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES "
    "INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME SEQ_CLS_HEAD_NAMES "
    "TOKENIZER_CONFIG_NAME UPCAST_DTYPES WEIGHTS_NAME"
)
_IA3_TARGETS = (
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"
)
_OWN_TARGETS = f"TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING {_IA3_TARGETS}"
_METHODS_WITH_TARGETS = (
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA LILY LNTUNING LOHA LOKR MISS OFT "
    "OSF PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT"
)
_MISSING_TARGETS = " ".join(
    f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING" for name in _METHODS_WITH_TARGETS.split()
)
_TUNERS = "IA3Model TrainableTokensModel"
_WRAPPERS = "AuxiliaryTrainingWrapper TrainableTokensWrapper"
_MODULE_FUNCTIONS = (
    "_freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules _is_valid_match _set_adapter "
    "get_quantization_config id_tensor_storage infer_device shift_tokens_right transpose"
)
_MISSING_UTILS = (
    "_prepare_prompt_learning_config _set_trainable get_gptqmodel_quant_linear get_quantization_kwargs "
    "map_cache_to_layer_device_map quantization_extra_repr replace_lora_weights_loftq "
    "set_additional_trainable_modules"
)
_LORA_LAYERS = "Conv1d Conv2d Conv3d Embedding Linear MultiheadAttention ParamWrapper"
_CONVERSION = "convert_to_lora save_as_lora"
_LORA_ROOM = {
    OWN: f"LoraConfig LoraLayer LoraModel LoraRuntimeConfig {_CONVERSION}",
    LAYER: _LORA_LAYERS,
    "missing": _LORA_EXTRAS,
}
_OTHER_QUANTIZED = {
    "aqlm": "AqlmLoraLinear",
    "awq": "AwqLoraLinear",
    "bnb": "Linear4bit Linear8bitLt",
    "eetq": "EetqLoraLinear",
    "gptq": "GPTQLoraLinear",
    "hqq": "HqqLoraLinear",
    "inc": "IncLoraLinear",
    "torchao": "TorchaoLoraLinear",
}

_DISPATCHERS = " ".join(f"dispatch_{name}" for name in (*_OTHER_QUANTIZED, "megatron", "default") if name != "bnb")
"""PEFT's functions that choose the class of a layer; nothing calls them here."""

_ONLY_HERE = {"Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "Linear4bit", "Linear8bitLt"}
"""Names of layer classes in the packages of several methods, and not in ``peft`` or ``peft.tuners``."""

_ADALORA = "AdaLoraConfig AdaLoraLayer AdaLoraModel SVDConv2d SVDLinear SVDLinear4bit SVDLinear8bitLt SVDQuantLinear"
_SHADOW = "DetachedShadowModel ShadowCache ShadowLayer"
METHODS = {
    "adalora": ("AdaLoRA", _ADALORA),
    "adamss": ("AdaMSS", "AdamssConfig AdamssLayer AdamssModel Linear"),
    "adaption_prompt": ("LLaMA-Adapter", "AdaptedAttention AdaptionPromptConfig AdaptionPromptModel"),
    "beft": ("BEFT", "BeftConfig BeftLayer BeftModel Linear"),
    "boft": ("BOFT", "BOFTConfig BOFTLayer BOFTModel Conv2d Linear"),
    "c3a": ("C3A", "C3AConfig C3ALayer C3ALinear C3AModel"),
    "cartridge": ("Cartridge", f"CartridgeConfig CartridgeEncoder {_CARTRIDGE_FUNCTIONS}"),
    "cpt": ("context-aware prompt tuning", "CPTConfig CPTEmbedding"),
    "deft": ("DEFT", "DeftConfig DeftLayer DeftLinear DeftModel"),
    "delora": ("DeLoRA", "DeloraConfig DeloraLayer DeloraLinear DeloraModel"),
    "fourierft": ("FourierFT", "FourierFTConfig FourierFTLayer FourierFTLinear FourierFTModel"),
    "frod": ("FRoD", "FrodConfig FrodLayer FrodModel Linear"),
    "glora": ("GLoRA", "GloraConfig GloraLayer GloraLinear GloraModel"),
    "gralora": ("GraLoRA", "GraloraConfig GraloraLayer GraloraModel Linear"),
    "hira": ("HiRA", "Conv1d Conv2d Conv3d Embedding HiraConfig HiraLayer HiraModel Linear"),
    "hra": ("HRA", "HRAConfig HRAConv2d HRALayer HRALinear HRAModel"),
    "lily": ("Lily", "LilyConfig LilyLayer LilyModel Linear"),
    "ln_tuning": ("LayerNorm tuning", "LNTuningConfig LNTuningLayer LNTuningModel"),
    "loha": ("LoHa", "Conv1d Conv2d Linear LoHaConfig LoHaLayer LoHaModel"),
    "lokr": ("LoKr", "Conv1d Conv2d Linear LoKrConfig LoKrLayer LoKrModel"),
    "miss": ("MiSS", "MissConfig MissLayer MissLinear MissModel"),
    "mixed": (
        "a separate class for mixed methods, as any PeftModel supports them",
        "COMPATIBLE_TUNER_TYPES MixedModel",
    ),
    "multitask_prompt_tuning": (
        "multitask prompt tuning",
        "MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    ),
    "oft": ("OFT", "Conv2d Embedding Linear OFTConfig OFTLayer OFTModel"),
    "osf": ("OSF", "Linear OSFConfig OSFLayer OSFModel"),
    "p_tuning": ("P-tuning", "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType"),
    "peanut": ("PEANuT", "Linear PeanutConfig PeanutLayer PeanutModel"),
    "poly": ("Polytropon", "Linear PolyConfig PolyLayer PolyModel"),
    "prefix_tuning": ("prefix tuning", "PrefixEncoder PrefixTuningConfig"),
    "prompt_tuning": ("prompt tuning", "PromptEmbedding PromptTuningConfig PromptTuningInit"),
    "psoft": ("PSOFT", "Linear PsoftConfig PsoftLayer PsoftModel"),
    "pvera": ("PVeRA", "Linear PveraConfig PveraLayer PveraModel"),
    "randlora": ("RandLoRA", "Linear RandLoraConfig RandLoraLayer RandLoraModel"),
    "road": ("RoAd", "Linear RoadConfig RoadLayer RoadModel"),
    "shadow": ("ShadowPEFT", "ShadowConfig ShadowModel"),
    "shira": ("SHiRA", "Linear ShiraConfig ShiraLayer ShiraModel"),
    "supertuning": ("Supertuning", "Linear SupertuningConfig SupertuningLayer SupertuningModel"),
    "tinylora": ("TinyLoRA", "Embedding Linear TinyLoraConfig TinyLoraLayer TinyLoraModel"),
    "unilora": ("Uni-LoRA", "Linear UniLoraConfig UniLoraLayer UniLoraModel"),
    "vblora": ("VB-LoRA", "Linear VBLoRAConfig VBLoRALayer VBLoRAModel"),
    "vera": ("VeRA", "Linear VeraConfig VeraLayer VeraModel"),
    "waveft": ("WaveFT", "WaveFTConfig WaveFTLayer WaveFTLinear WaveFTModel"),
    "xlora": ("X-LoRA", "XLoraConfig XLoraLayer XLoraModel"),
}
"""Package in ``peft.tuners`` of a method that may be missing in nbpeft -> its display name, the names in it."""

_METHOD_NAMES = " ".join(
    name for _, names in METHODS.values() for name in names.split() if name not in _ONLY_HERE and name[-5:] != "Layer"
)


NOT_IN_ROOT = (
    "AdaptedAttention C3ALinear COMPATIBLE_TUNER_TYPES CordaConfig DeftLinear DeloraLinear DoraCaching "
    "FourierFTLinear GloraLinear HRAConv2d HRALinear KappaTuneSelector LoraLayer MissLinear MixedModel "
    "ModulesToSaveWrapper MontecloraTrainerMixin MultitaskPromptEmbedding PEFT_TYPE_TO_PREFIX_MAPPING SVDConv2d "
    "SVDLinear SVDLinear4bit SVDLinear8bitLt SVDQuantLinear WaveFTLinear cast_adapter_dtype check_if_peft_model "
    "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer delete_adapter "
    "disable_input_dtype_casting hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap "
    "preprocess_corda reduce_intruder_dimension rescale_adapter_scale set_adapter set_requires_grad "
    "update_forward_signature update_generate_signature update_signature"
)
"""Names that ``from peft import *`` does not bring: PEFT has them in its submodules alone."""


def _targets_of(package: str) -> str:
    """Returns the names of a method's table of targets and of its quantized layers."""
    return f"TRANSFORMERS_MODELS_TO_{package.replace('_', '').upper()}_TARGET_MODULES_MAPPING Linear4bit Linear8bitLt"


MODULES: dict[str, dict[str, str]] = {
    "": {
        "mappings": f"MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING {_MAPPINGS}",
        "helpers": "shift_tokens_right",
        "layers": f"{_TUNERS} PeftMixedModel",
        OWN: f"PromptLearningConfig find_kappa_target_modules {_METHOD_NAMES}",
        "missing": f"replace_lora_weights_loftq {_LORA_EXTRAS} {_PREFIX_POSTPROCESSING}",
    },
    "auto": {OWN: _AUTO, "mappings": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"},
    "config": {
        OWN: "PeftConfig PromptLearningConfig",
        "constants": "CONFIG_NAME MIN_EXPECTED_CONFIG_KEYS",
        "missing": "PeftConfigMixin",
    },
    "functional": {
        OWN: f"{_ADAPTER_FUNCTIONS} get_peft_model_state_dict inject_adapter_in_model set_peft_model_state_dict"
    },
    "helpers": {
        OWN: (
            "DoraCaching KappaTuneSelector check_if_peft_model disable_input_dtype_casting "
            "find_kappa_target_modules rescale_adapter_scale "
            "update_forward_signature update_generate_signature update_signature"
        ),
        "missing": "MontecloraTrainerMixin",
    },
    "import_utils": {
        "imports": (
            "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available "
            "is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available "
            "is_te_pytorch_available is_torch_tpu_available is_torchao_available is_torchao_ge_v0_18_0 "
            "is_transformers_ge_v5 is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 is_transformers_ge_v5_1_0 "
            "is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 is_transformers_le_4_53 is_xpu_available"
        )
    },
    "mapping": {
        "mappings": f"PEFT_TYPE_TO_MIXED_MODEL_MAPPING {_MAPPINGS}",
        OWN: "get_peft_config get_peft_model inject_adapter_in_model",
    },
    "mapping_func": {"mappings": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", OWN: "get_peft_model"},
    "mixed_model": {"layers": "PeftMixedModel"},
    "optimizers": {
        OWN: "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    },
    "optimizers.lorafa": {OWN: "create_lorafa_optimizer", "building_blocks": "LoraFAOptimizer"},
    "optimizers.loraplus": {OWN: "create_loraplus_optimizer"},
    "optimizers.riemannian": {
        OWN: "create_riemannian_optimizer",
        "building_blocks": "_RiemannianPreconditioner _collect_lora_pairs",
    },
    "peft_model": {
        OWN: f"{_MODELS} PeftConfig PeftType TaskType",
        "mappings": _MAPPINGS,
        "layers": "TunerLayerStatus TunerModelStatus",
    },
    "tuners": {
        OWN: f"IA3Config LoraConfig LoraModel LoraRuntimeConfig TrainableTokensConfig {_CONVERSION} {_METHOD_NAMES}",
        "layers": _TUNERS,
        "missing": _LORA_EXTRAS,
    },
    "tuners.tuners_utils": {
        OWN: f"{_ADAPTER_FUNCTIONS} PeftConfig",
        "layers": "BasePromptEncoder BaseTuner BaseTunerLayer",
        "helpers": "_filter_state_dict_by_key_prefixes _find_minimal_target_modules _get_tuner_state_dict_key_prefixes "
        "_maybe_include_all_linear_layers check_adapters_to_merge check_target_module_exists "
        "find_parameter_name_by_module get_device_map inspect_matched_modules onload_layer",
        "constants": "DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
        "MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES UPCAST_DTYPES",
        "missing": "clone_module replicate_layers",
    },
    "tuners.lora": {**_LORA_ROOM, LAYER: f"{_LORA_LAYERS} {' '.join(_OTHER_QUANTIZED.values())}"},
    "tuners.lora.config": {OWN: "LoraConfig LoraRuntimeConfig", "missing": _LORA_EXTRAS},
    "tuners.lora.layer": {
        **_LORA_ROOM,
        "constants": "VARIANT_KWARG_KEYS",
        "missing": f"{_LORA_EXTRAS} LoraVariant _LoraFactorsProxy _LoraParameterProxy dispatch_default",
    },
    "tuners.lora.model": {
        OWN: "LoraConfig LoraLayer LoraModel",
        "constants": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "missing": _DISPATCHERS,
    },
    "tuners.lora.conversion": {OWN: _CONVERSION},
    "tuners._buffer_dict": {"building_blocks": "BufferDict"},
    "tuners.lora.arrow": {
        OWN: "create_arrow_model",
        "building_blocks": "_resolve_adapter_source",
        "missing": "ArrowLoraLinearLayer",
    },
    "tuners.lora.dora": {
        "constants": "ENABLE_DORA_CACHING",
        "missing": "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer",
    },
    "tuners.lora.tp_layer": {"missing": "LoraParallelLinear dispatch_megatron get_default_module_allowlist"},
    "tuners.lora.corda": {OWN: "preprocess_corda", "inits": "CordaEigens"},
    "tuners.lora.eva": {
        OWN: "get_eva_state_dict initialize_lora_eva_weights",
        "eva_hooks": "HashHook SVDHook",
        "inits": "forward_fn_dict prepare_layer_inputs_fn_language_modeling prepare_model_inputs_fn_language_modeling",
    },
    "tuners.lora.intruders": {OWN: "reduce_intruder_dimension"},
    "tuners.lora.loraga": {OWN: "preprocess_loraga", "inits": "estimate_gradients"},
    "tuners.lora.monteclora": {"missing": "BufferedMontecloraSampler MontecloraSampler"},
    "tuners.lora.te": {"missing": "TeLinear"},
    "tuners.lora.variants": {
        "building_blocks": "BlockDiagonalLinear calculate_alora_offsets get_alora_offsets_for_forward "
        "get_alora_offsets_for_generate is_alora_relevant_in_batch",
        "missing": "ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant DoraConv1dVariant "
        "DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant DoraLinearVariant KasaLinearVariant "
        "MiCALinearVariant MontecloraLinearVariant QALoraLinearVariant VeloraLinearVariant",
    },
    "tuners.lora.velora": {
        "building_blocks": "VeloraFunction _compress_activations _normalize_projection _reconstruct_activations "
        "_reshape_to_grouped_subtokens"
    },
    **{
        f"tuners.lora.{place}": {
            LAYER: names,
            "missing": "dispatch_bnb_4bit dispatch_bnb_8bit" if place == "bnb" else f"dispatch_{place}",
        }
        for place, names in _OTHER_QUANTIZED.items()
    },
    "tuners.ia3": {
        OWN: "IA3Config",
        "layers": "IA3Layer IA3Model",
        LAYER: "Conv2d Conv3d Linear Linear4bit Linear8bitLt",
    },
    "tuners.ia3.bnb": {LAYER: "Linear4bit Linear8bitLt"},
    "tuners.ia3.config": {OWN: "IA3Config"},
    "tuners.ia3.layer": {"layers": "IA3Layer", LAYER: "Conv2d Conv3d Linear"},
    "tuners.ia3.model": {"layers": "IA3Model", "constants": _IA3_TARGETS},
    "tuners.trainable_tokens": {
        OWN: "TrainableTokensConfig",
        "layers": "TrainableTokensLayer TrainableTokensModel",
    },
    "tuners.trainable_tokens.config": {OWN: "TrainableTokensConfig"},
    "tuners.trainable_tokens.layer": {"layers": "TrainableTokensLayer"},
    "tuners.trainable_tokens.model": {"layers": "TrainableTokensModel"},
    "tuners.lycoris_utils": {"missing": "LycorisConfig LycorisLayer LycorisTuner"},
    **{
        f"tuners.{package}{part}": {OWN: names, "missing": _targets_of(package)}
        for package, (_, names) in METHODS.items()
        for part in ("", ".bnb", ".config", ".layer", ".model")
    },
    "tuners.lokr.layer": {
        OWN: METHODS["lokr"][1],
        "building_blocks": "factorization",
        "missing": _targets_of("lokr"),
    },
    **{
        f"tuners.adalora{part}": {
            OWN: _ADALORA,
            "building_blocks": "RankAllocator",
            "missing": _targets_of("adalora"),
        }
        for part in ("", ".layer", ".model")
    },
    "tuners.adalora.gptq": {OWN: "SVDQuantLinear"},
    "tuners.adamss.asa_callback": {"callbacks": "AdamssAsaCallback"},
    "tuners.adamss.utils": {"missing": "clustering_Z get_trainable_subspaces seg_locations slice_pca"},
    "tuners.poly.router": {"layers": "PolyRouter", "missing": "Router get_router"},
    "tuners.shira.mask_functions": {"inits": "random_mask"},
    "tuners.xlora.classifier": {"layers": "XLoraClassifier"},
    "tuners.osf.utils": {"subspaces": "decompose_weight_matrix project_gradient_to_orthogonal_space"},
    "tuners.shadow.diffusion_models": {"shadow": "DetachedFluxShadowModel"},
    **{
        f"tuners.shadow{part}": {OWN: METHODS["shadow"][1], "shadow": _SHADOW, "missing": "ShadowCarrier"}
        for part in ("", ".layers")
    },
    "tuners.cartridge.utils": {OWN: _CARTRIDGE_FUNCTIONS},
    "utils": {
        OWN: (
            "ModulesToSaveWrapper NoMatchingPeftModuleError PeftError PeftType PeftWarning TaskType "
            f"cast_mixed_precision_params prepare_model_for_kbit_training {_STATE_DICTS}"
        ),
        "constants": f"{_CONSTANTS} {_OWN_TARGETS}",
        "layers": _WRAPPERS,
        "helpers": _MODULE_FUNCTIONS,
        "mappings": "register_peft_method",
        "quantization": "resolve_quantization_backend",
        "missing": f"{_MISSING_UTILS} {_MISSING_TARGETS} {_PREFIX_POSTPROCESSING}",
    },
    "utils.constants": {
        "constants": f"{_CONSTANTS} {_OWN_TARGETS}",
        "missing": f"{_MISSING_TARGETS} {_PREFIX_POSTPROCESSING} {_STARCODER}",
    },
    "utils.error": {OWN: "NoMatchingPeftModuleError PeftError"},
    "utils.hotswap": {
        OWN: "prepare_model_for_compiled_hotswap",
        "swapping": "hotswap_adapter hotswap_adapter_from_state_dict",
        "constants": "CONFIG_KEYS_TO_CHECK",
        "helpers": "check_hotswap_configs_compatible",
    },
    "utils.integrations": {
        "helpers": "check_deepspeed_zero3_enabled dequantize_module_weight get_bnb_param_type",
        "building_blocks": "init_empty_weights skip_init_on_device",
        "missing": "dequantize_bnb_weight gather_params_ctx get_layer_device_map map_cache_to_layer_device_map",
    },
    "utils.loftq_utils": {OWN: "replace_lora_weights_loftq", "inits": "loftq_init"},
    "utils.merge_utils": {
        "merging": "dare_linear dare_ties magnitude_prune task_arithmetic ties",
        "missing": "calculate_majority_sign_mask disjoint_merge magnitude_based_pruning prune random_pruning "
        "reshape_weight_task_tensors",
    },
    "utils.other": {
        OWN: "ModulesToSaveWrapper cast_mixed_precision_params prepare_model_for_kbit_training",
        "constants": f"{_CONSTANTS} {_OWN_TARGETS}",
        "layers": _WRAPPERS,
        "helpers": f"{_MODULE_FUNCTIONS} _get_module_names_tied_with_embedding _get_no_split_modules "
        "_set_layer_requires_grad fsdp_auto_wrap_policy get_pattern_key "
        "match_target_against_key str_to_bool",
        "quantization": "resolve_quantization_backend",
        "missing": f"{_MISSING_UTILS} {_MISSING_TARGETS} {_PREFIX_POSTPROCESSING} {_STARCODER} "
        "check_file_exists_on_hf_hub",
    },
    "utils.peft_types": {OWN: "PeftType TaskType", "mappings": "register_peft_method"},
    "utils.quantization_utils": {
        "quantization": "Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend HqqBackend QuantizationBackend "
        "TorchaoBackend resolve_quantization_backend",
        "missing": "get_quantization_kwargs quantization_extra_repr",
    },
    "utils.incremental_pca": {"inits": "IncrementalPCA"},
    "utils.save_and_load": {
        OWN: _STATE_DICTS,
        "helpers": (
            "_find_mismatched_keys _insert_adapter_name_into_state_dict _maybe_shard_state_dict_for_tp "
            "get_embedding_layer_name has_valid_embedding_base_layer torch_load"
        ),
    },
    "utils.transformers_weight_conversion": {
        "conversion": "build_peft_weight_mapping get_model_conversion_mapping",
        "missing": "FlattenDims PeftConcatenate PermuteDims convert_peft_adapter_state_dict_for_transformers "
        "convert_peft_config_for_transformers",
    },
    "utils.warning": {OWN: "PeftWarning"},
}
"""PEFT's module below ``peft`` -> origin -> names, separated by spaces."""

_PACKAGE_OF = {name: package for package, (_, names) in METHODS.items() for name in names.split()} | {
    name: package for package in METHODS for name in _targets_of(package).split()[:1]
}


def names_in(place: str) -> list[str]:
    """Returns the names in a module; for ``peft`` itself, only those that are not public names of ``nbpeft``."""
    return sorted(_origins(place))


_IMPORTED = (
    *("import_utils", "config", "utils", "utils.other", "utils.save_and_load", "utils.integrations", "utils.constants"),
    *("utils.merge_utils", "tuners.tuners_utils", "mapping"),
)
"""Modules whose names PEFT's other modules import for themselves, and from which scripts then import them."""


def value(place: str, name: str) -> Any:
    """Returns the value of a name that a module has or, as PEFT's modules do, has imported from another one.

    Args:
        place: module of PEFT below ``peft``.
        name: the name.

    Raises:
        KeyError: the module has no such name.
    """
    if name not in _origins(place) and place:
        place = next((other for other in _IMPORTED if name in _origins(other)), place)
    origin = _origins(place)[name]
    room = place.split(".")[1] if place.startswith("tuners.") else ""
    if origin == LAYER:
        return _module("layers").layer_class(f"{room}.{name}")
    if origin not in (OWN, "missing"):
        return getattr(_module(origin), name)
    root = sys.modules[_ROOT]
    if name in root.__all__:
        return getattr(root, name)
    package = room if room in METHODS else _PACKAGE_OF.get(name, "")
    if package and (found := _module("layers").of_method(package, name)) is not None:
        return found
    return missing(
        name, METHODS[package][0] if package and origin == OWN else "", f"tuners.{room}" if name in _ONLY_HERE else ""
    )


def _origins(place: str) -> dict[str, str]:
    return {name: origin for origin, names in MODULES[place].items() for name in names.split()}


def _module(name: str) -> Any:
    return importlib.import_module(f"{_ROOT}.peft_api.{name}")
