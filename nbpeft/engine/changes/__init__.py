"""What acts at this moment, and how a change of it is made whole or not at all.

Door: ``transaction`` (changes that can be undone until they are committed), ``active_state`` (which adapters act, in
which call), ``step_gate`` (who may change a model while others compute with it).
"""
