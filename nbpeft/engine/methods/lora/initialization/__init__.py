"""Initialization of LoRA's factors: ``inits.py`` by the value of ``init_lora_weights``; the other files compute."""
