"""Methods that put trained vectors before the input, or before the keys and values of attention.

What they share is in ``engine/calls``: ``token_prompt`` and ``cached_prefix`` have their base classes, and
``model_calls`` inserts the vectors into a call, or refuses it.
"""
