"""One adapter of several, and adapters of any method written as LoRA.

Door, what other rooms import:

    combining.py   Combining adapters of a model into a new one
    conversion.py  Adapters of any method written as LoRA
"""
