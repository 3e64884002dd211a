"""A training run for its user: counts, curves, Stop, Pause, Save, and how it ended.

Door, what other rooms import:

    callback.py          Connects a transformers Trainer to a run: it feeds the run and carries out Stop and Pause
    control.py           Stop, Pause and Save for a running training, requested from any thread, carried out between
                         steps
    failures.py          A one-line explanation of the error that ended a run, with the remedy if it is known
    record.py            The numbers of a run: steps, losses, tokens, speed, and curves of limited size
    result.py            The result of a training, for the output of a cell
    run.py               One training run for front ends: counts, curves and speed, fed by any loop
    run_checkpointer.py  Saves a training to disk while it runs: if its process dies, only some seconds of it are lost
    tracebacks.py        Releases tensors that a stored traceback would keep alive

Inside:

    memory_meter.py  Measures memory for the states of a run, at little cost and in any thread
    stopwatch.py     The time that a run takes, without its pauses
"""
