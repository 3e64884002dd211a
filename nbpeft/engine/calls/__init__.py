"""Adapters that change a model's call instead of a layer: prompts, prefixes, networks that run with it.

Door, what other rooms import:

    cached_prefix.py        Prompts of keys and values that are in front of those of each layer, where a cache has the
                            tokens before the input
    first_pass.py           Lets an adapter see what a model makes of an input before the call in which it acts
    inner_calls.py          Lets model adapters add to what modules inside the model give: a hook on each of those
                            modules
    model_calls.py          Puts what model adapters give into the calls of a model: embeddings, mask, positions,
                            cache and labels
    prompt_twins.py         A base model of its own for a second prompt: prompts change no weights, so that two can be
                            learned over one base
    selective_recompute.py  Activations and norms of any model compute again in backward what they would keep for it
    side_network.py         Runs the network of an adapter beside a model: its state goes through the model's blocks
                            with the hidden states
    task_ids.py             ``task_ids``: an argument of a call that says which task each row is of, for methods that
                            learn several together
    token_prompt.py         Prompts that are rows of an embedding of their own, and what those start as
    two_pass_cache.py       A cache of keys and values for a model that runs twice for each call, or beside another
                            one: it carries a second

Inside:

    prepared_calls.py  Hooks on a model that compute something before each of its calls, and hooks on modules inside
                       it, for its adapters
"""
