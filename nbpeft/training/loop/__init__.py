"""``train(model, data)``: rows made ready, a Trainer made, run and closed.

Door, what other rooms import:

    packing.py  Several rows in one sequence, for models of which each row then learns what it would learn alone
    prepare.py  Makes a quantized base model ready for training adapters on it
    rows.py     The rows that a model is trained and evaluated on: prepared for it, and checked against it
    train.py    ``train(model, data)``: one call that a notebook cell makes

Inside:

    grouping.py  Batches of rows that are about as long, so that little of them is padding
"""
