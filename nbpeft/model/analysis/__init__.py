"""Where an adapter changed a model, and what a method can do.

Door, what other rooms import:

    inspection.py    Where an adapter changed a model, layer by layer
    intruders.py     Intruder dimensions: strong directions of an adapted weight that the weight did not have before
    kappa.py         KappaTune: adapt the layers whose weights are best conditioned, and leave what is specialised as
                     it is
    method_facts.py  What each method can do, found out on a small layer
"""
