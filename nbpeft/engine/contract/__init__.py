"""What a method, a kind of layer and a way to store weights have to say, and the registry of those that do.

Start with ``adapter.py`` (a config and an adapter) and ``registry.py`` (the record of a method); ``base.py`` says what
a method may ask of the layer it adapts. ``weight_delta.py`` is the shortest way to a method of one's own.
"""
