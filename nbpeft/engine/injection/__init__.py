"""From a config to modules in the tree: check, plan, build, commit.

Door, what other rooms import:

    biases.py          Parameters of the base model that belong to an adapter: biases that it trains, embeddings from
                       its file
    build.py           Builds all parts of an adapter before any of them touches the model
    injection_plan.py  The plan of a change: which modules get adapters and copies, and what that costs
    plan.py            Plans what applying a config will change in a model
    redirects.py       Where a function from outside may send a target elsewhere, or leave it out
    replication.py     Repeats layers of a transformer, each time with separate adapters (``layer_replication``)

Inside:

    config_warnings.py     Warnings about a config that is valid but probably not what the user meant
    custom_layers.py       Layers of a user's own class, registered with PEFT's ``_register_custom_module``
    encoder_fast_paths.py  Disables the fast path of nn.TransformerEncoderLayer, which reads weights of inner layers
                           without calling them
    injection_checks.py    Checks which modules of a model cannot have an adapter, before anything is changed
"""
