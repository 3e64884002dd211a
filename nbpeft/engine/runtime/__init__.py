"""The adapters of one model: which there are, which act, merged or not, and when that may change.

Door: ``AdapterManager`` in ``manager.py``; ``snapshots`` (an adapter as a value: copied, undone,
restored) and ``scopes`` (choices that hold for a block).
"""
