"""Which adapters are active now, and how changes to a model succeed as a whole or are undone.

Door, what other rooms import:

    active_state.py    Which adapters are active: one object that every adapted layer of a model reads
    called_modules.py  The modules of a model including its adapters, and whether anything but their class runs in
                       their calls
    random_numbers.py  The states of a process's random generators, and blocks that draw from separate ones
    spill_file.py      Backups of weights for the case of a failure: in memory while there is plenty of it, else on disk
    step_gate.py       Lets other threads use a model between the steps of a training that runs in the background
    transaction.py     Changes to a model that either succeed as a whole or are undone: record the old state, then
                       write

Inside:

"""
