"""Where an adapter changed a model, and what a method can do."""
