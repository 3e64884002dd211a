"""Combining adapters into one, and converting adapters of any method to LoRA.

Door, what other rooms import:

    combining.py   Combining adapters of a model into a new adapter
    conversion.py  Converting adapters of any method to LoRA
"""
