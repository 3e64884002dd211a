"""What an adapter changed in a model, and what each method can do.

Door, what other rooms import:

    inspection.py    How much an adapter changes each layer of a model
    intruders.py     Intruder dimensions: strong singular directions that only the adapted weight has
    kappa.py         KappaTune: adapt the layers with the best conditioned weights, which forget least
    method_facts.py  What each method supports, tested on a small layer
"""
