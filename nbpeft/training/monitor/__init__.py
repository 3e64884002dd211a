"""A run as a person sees and steers it: counts, curves, Stop, Pause, Save, how it ended.

Door: ``TrainingRun`` in ``run.py``; ``callback.py`` connects a Trainer to it.
"""
