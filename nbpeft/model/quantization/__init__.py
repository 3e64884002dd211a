"""Base models in fewer bits: loading, quantizing in memory, and which part is stored how."""
