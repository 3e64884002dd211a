"""One adapter of several, and adapters of any method written as LoRA."""
