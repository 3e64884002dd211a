"""What an adapter changed in a model, and what each method can do.

Door, what other rooms import:

    inspection.py     How much an adapter changes each layer of a model
    intruders.py      Intruder dimensions: strong singular directions of an adapted weight that the original weight
                      does not have
    kappa.py          KappaTune: adapts the layers with the best conditioned weights, and leaves specialized layers
                      unchanged
    method_checks.py  ``check_method``: runs checks of a method on small models
    method_facts.py   What each method supports, tested on a small layer
    method_report.py  ``MethodReport``: what ``check_method`` found, one entry for each check on each model

Inside:

    method_trials.py  The small models that ``check_method`` uses, and a config on one of them
"""
