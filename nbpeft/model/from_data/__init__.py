"""What is computed from rows that a model is shown: starts of adapters, and merges that lose less."""
