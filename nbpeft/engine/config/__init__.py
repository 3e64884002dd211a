"""Which values of a config are valid, and which layers of a model they mean.

Door: ``LayersConfig`` and ``PromptConfig`` (the fields that methods share), ``config_checks`` (values), ``targets`` and
``patterns`` (names of layers).
"""
