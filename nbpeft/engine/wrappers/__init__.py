"""What stands in the place of a layer that has adapters: its forward, merging and undoing that.

Door: ``AdaptedLayer`` in ``layer.py``, ``AdaptedParameter`` in ``parameter_layer.py``, ``modules_to_save``.
"""
