"""Adapters that change a model's call instead of a layer: prompts, prefixes, side networks.

Door, what other rooms import:

    cached_prefix.py        Prefixes: trained keys and values that come before those of the input in each layer's
                            cache
    first_pass.py           Runs a model once before each call, for adapters that read its hidden states
    inner_calls.py          Lets model adapters add to the outputs of modules inside the model: a hook on each of
                            those modules
    model_calls.py          Inserts prompts into the calls of a model: embeddings, mask, positions, cache and labels
    model_properties.py     Properties of a model on which its calls depend: its arguments, cache, encoder, labels and
                            gradient checkpointing
    manual_prompts.py       Prompts that a script asks for and puts into a call itself are not put in a second time
    prompt_twins.py         A copy of the module tree for a second prompt: prompts change no weights, so two can be
                            trained on one base
    selective_recompute.py  Recomputes activations and norms of any model in backward instead of storing them
    side_network.py         Runs an adapter's network next to a model: its state passes through the model's blocks
                            with the hidden states
    task_ids.py             ``task_ids``: a call argument with the task of each row, for methods that train several
                            tasks together
    token_prompt.py         Prompts that are rows of a separate embedding, and their initialization
    two_pass_cache.py       A cache of keys and values that contains a second one, for a model that runs twice or next
                            to a side network

Inside:

    prepared_calls.py  Hooks that compute a context for adapters before each call of a model, and hooks on modules
                       inside it
"""
