"""Which values of a config are valid, and which layers of a model they mean.

Door, what other rooms import:

    adapter_names.py  Checks of adapter names and scales, and dictionaries by adapter name
    config_checks.py  Checks of config fields that several methods have: targets, ranks, dropouts, patterns
    default_targets.py  Default targets by model type: a table for each type of method, which scripts may change
    layers_config.py  Base classes of configs with the fields of most methods: the layers to adapt, rank and alpha
    module_paths.py   Matching of names and patterns against the end of module paths
    patterns.py       Refuses regular expressions in configs whose matching could take too long (catastrophic
                      backtracking)
    prompt_config.py  Base classes of configs for methods that learn a prompt: the number of tokens, and sizes of the
                      model
    targets.py        Resolves target names and patterns to module paths; works on paths alone, without a model
"""
