"""What acts at this moment, and how a change of it is made whole or not at all.

Door, what other rooms import:

    active_state.py    Which adapters act: one object that every adapted layer of a model reads
    called_modules.py  The modules that are called, moved and put into another mode with a model, and what runs in
                       their calls
    random_numbers.py  The random numbers of a process: their state, and blocks that have random numbers of their own
    spill_file.py      Weights that are only kept in case something goes wrong: on disk, so that they take no memory
    step_gate.py       Turns of other threads between the steps of a training that runs in the background
    transaction.py     One way to change a model: record how to undo, write, and be undone by whatever goes wrong
"""
