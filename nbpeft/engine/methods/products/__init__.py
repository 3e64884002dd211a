"""Methods whose change of a weight is a product of small matrices, except LoRA."""
