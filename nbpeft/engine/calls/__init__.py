"""Adapters that change a model's call instead of a layer: prompts, prefixes, networks that run with it.

Door: ``model_calls`` (what is called before and after a model's forward).
"""
