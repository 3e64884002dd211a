"""Methods whose change of a weight is a product of small matrices, other than LoRA's."""
