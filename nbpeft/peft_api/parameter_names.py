"""Names under which layers of PEFT's methods keep what their adapters have, as attributes of PEFT's layer classes.

Other libraries read them from the classes, whether a layer of the method is in a model or not.
"""

from __future__ import annotations

from nbpeft.engine.methods.lora.custom_layers import LoraLayer

_NAMES = {
    "adalora": (
        "lora_A lora_B lora_E lora_embedding_A lora_embedding_B",
        "r lora_alpha scaling lora_dropout ranknum",
    ),
    "adamss": (
        "adamss_A adamss_B",
        "num_subspaces train_subspace_index seg_result scatter_index exp_avg_ipt_A exp_avg_ipt_B "
        "exp_avg_unc_A exp_avg_unc_B adamss_newB",
    ),
    "beft": ("beft_bias", ""),
    "boft": ("boft_R boft_s", "boft_block_size boft_block_num boft_dropout"),
    "c3a": ("c3a_kernel", "block_size"),
    "deft": (
        "deft_P deft_R",
        "deft_r deft_decomposition deft_init_scale deft_para deft_scaling deft_dropout _cached_merge_factor",
    ),
    "delora": ("delora_A delora_B delora_lambda", "r delora_dropout delora_w_norm"),
    "fourierft": ("fourierft_spectrum", "fourierft_n_frequency fourierft_scaling fourierft_random_loc_seed indices"),
    "frod": (
        "frod_lambda_l frod_lambda_s_values",
        "r frod_V frod_U frod_s_indices frod_s_size runtime_offload_base_weight frod_dropout",
    ),
    "glora": ("glora_A glora_B glora_C glora_D glora_E", "r"),
    "gralora": (
        "gralora_A gralora_B gralora_A_general gralora_B_general",
        "r hybrid_r alpha scaling gralora_dropout gralora_k",
    ),
    "hira": ("hira_A hira_B hira_embedding_A hira_embedding_B", "r hira_dropout"),
    "hra": ("hra_u", "hra_r hra_apply_GS"),
    "ia3": ("ia3_l", ""),
    "lily": ("lily_A lily_B lily_router", "r scaling stride_A num_B"),
    "ln_tuning": ("ln_tuning_layers", ""),
    "loha": (
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
        "r alpha scaling rank_dropout rank_dropout_scale module_dropout",
    ),
    "lokr": (
        "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
        "r alpha scaling rank_dropout rank_dropout_scale module_dropout",
    ),
    "miss": ("miss_block", "miss_r miss_dropout miss_mini_r"),
    "oft": ("oft_R oft_embedding_R", "r oft_block_size oft_dropout"),
    "osf": (
        "osf_svd_params",
        "_osf_U_low_init _osf_S_low_init _osf_V_low_init _osf_U_high _osf_V_high effective_rank",
    ),
    "peanut": ("peanut_A peanut_B peanut_encoders peanut_decoders", "r depth scaling act_fn res_num"),
    "poly": ("poly_lora_A poly_lora_B poly_router", "r n_tasks n_skills n_splits poly_type"),
    "psoft": (
        "psoft_R",
        "r psoft_alpha scaling psoft_dropout psoft_svd psoft_svd_lowrank_niter random_seed ab_svd_init "
        "_psoft_A_cache _psoft_B_cache",
    ),
    "pvera": ("pvera_lambda_b pvera_lambda_d", "pvera_A pvera_B pvera_dropout r sample_at_inference pvera_generator"),
    "randlora": ("randlora_lambda randlora_gamma", "randlora_A randlora_B randlora_dropout r scaling"),
    "road": ("road_theta road_alpha", "variant group_size"),
    "shira": ("shira_weight", "r scaling shira_indices"),
    "supertuning": (
        "supertuning_values supertuning_lora_A supertuning_lora_B",
        "supertuning_indices supertuning_rank supertuning_lora_alpha supertuning_lora_dropout",
    ),
    "tinylora": ("tinylora_v", "tinylora_A tinylora_B tinylora_P"),
    "trainable_tokens": ("trainable_tokens_delta", "token_indices trainable_tokens_original"),
    "unilora": (
        "unilora_theta_d",
        "r unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B unilora_dropout",
    ),
    "vblora": ("vblora_logits_A vblora_logits_B vblora_vector_bank", "r topk vblora_dropout"),
    "vera": ("vera_lambda_b vera_lambda_d", "vera_A vera_B vera_dropout r"),
    "waveft": (
        "waveft_spectrum",
        "waveft_n_frequency waveft_scaling waveft_random_loc_seed waveft_wavelet_family waveft_indices waveft_use_idwt",
    ),
}
"""Package in ``peft.tuners`` -> names of parameters, names of the rest."""


def parameter_names(package: str) -> dict[str, tuple[str, ...]]:
    """The attributes of a method's layer classes that hold them.

    Args:
        package: in ``peft.tuners``.

    Returns:
        Nothing for a method that PEFT does not have, or that has no layers.
    """
    if package == "lora":
        return {name: getattr(LoraLayer, name) for name in ("adapter_layer_names", "other_param_names")}
    if package not in _NAMES:
        return {}
    parameters, others = _NAMES[package]
    return {"adapter_layer_names": tuple(parameters.split()), "other_param_names": tuple(others.split())}
