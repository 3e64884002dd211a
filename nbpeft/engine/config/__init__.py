"""Which values of a config are valid, and which layers of a model they mean.

Door, what other rooms import:

    adapter_names.py  Names and scales of adapters, as people give them
    config_checks.py  Checks of the config fields that several methods have: which modules they target, ranks, shares,
                      patterns
    layers_config.py  Fields that the configs of most methods have: which layers they adapt, with which rank and
                      strength
    module_paths.py   Names and patterns that mean modules by the end of their path
    patterns.py       Regular expressions of configs, refused where matching one could take for ever
    prompt_config.py  What the configs of all methods that learn a prompt have: how many tokens, and the sizes of the
                      model
    targets.py        Target patterns -> module paths: which paths a config means, without touching a model
"""
