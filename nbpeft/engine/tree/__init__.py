"""What is where in a model: layers that can be adapted, layers that are, and weights that share storage.

Door: ``model_tree`` (the layers of a model and its manager), ``adapted_tree`` (what other libraries did to them by
hand), ``fused_layers``, ``tied_weights``.
"""
