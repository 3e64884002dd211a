"""The handle on a base model with adapters: ``PeftModel``, its task classes and what is called on it.

Door: ``PeftModel`` in ``peft_model.py``, ``get_peft_model`` in ``tasks.py``. ``tuner.py`` is what PEFT puts between the
handle and the base model.
"""
