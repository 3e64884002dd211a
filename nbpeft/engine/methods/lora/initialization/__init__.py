"""How the factors of LoRA start: ``inits.py`` by the value of ``init_lora_weights``, the rest what it computes with."""
