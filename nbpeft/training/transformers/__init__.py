"""transformers' ``Trainer`` with adapters: its arguments, and what nbpeft changes in it."""
