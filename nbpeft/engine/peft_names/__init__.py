"""The names that users of PEFT find on adapted layers: ``lora_A["default"]``, ``scaling``, ``merged_adapters``.

Each method's record says which of its numbers has which name; this room makes attributes and modules of them.
"""
