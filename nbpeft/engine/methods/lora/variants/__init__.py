"""Methods that are LoRA with one thing changed; each file registers its own."""
