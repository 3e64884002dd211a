"""From a config to modules in the tree: ask, plan, build, commit.

Door, what other rooms import:

    biases.py       Tensors of the base that belong to an adapter: biases it trains, embeddings that its file brought
    build.py        Builds all parts of an adapter before any of them touches the model
    plan.py         What applying a config would change in a model
    replication.py  Layers of a transformer that are used several times, each time with adapters of their own
                    (``layer_replication``)

Inside:

    config_warnings.py     Warnings about a config that is valid but probably not what was meant, and models nothing
                           can be done with yet
    custom_layers.py       Layers of somebody else's class, as PEFT's ``_register_custom_module`` brings them, among
                           those of the engine
    encoder_fast_paths.py  The fast path of nn.TransformerEncoderLayer, which reads the weights of the layers inside
                           and calls none of them
    injection_checks.py    What of a model can carry no adapter, asked before anything is changed
"""
