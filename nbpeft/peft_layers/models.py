"""PEFT's attributes of adapted base models; transformers and diffusers look for them."""

from __future__ import annotations

from nbpeft.engine.wrappers.extension import on_models

on_models["peft_config"] = "configs"
