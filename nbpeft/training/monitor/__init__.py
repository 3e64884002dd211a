"""A run as a person sees and steers it: counts, curves, Stop, Pause, Save, how it ended.

Door, what other rooms import:

    callback.py          Connects a transformers Trainer to a run: it feeds the run and carries out its Stop and Pause
    control.py           Stop, Pause and Save for a running training, requested from anywhere, carried out between
                         steps
    failures.py          One line about what ended a run, with the remedy where it is known
    record.py            The numbers of a run: steps, losses, tokens, the speed that follows, and curves that stay
                         small
    result.py            What a training leaves behind, for the output of a cell
    run.py               One training run as a front end sees it: counts, curves and speed, fed by any loop
    run_checkpointer.py  Keeps a training on disk as it goes on: when its process dies, some seconds of it are lost
    tracebacks.py        Lets go of tensors that a stored traceback would keep alive

Door, what other rooms import:

    callback.py          Connects a transformers Trainer to a run: it feeds the run and carries out its Stop and Pause
    control.py           Stop, Pause and Save for a running training, requested from anywhere, carried out between
                         steps
    failures.py          One line about what ended a run, with the remedy where it is known
    record.py            The numbers of a run: steps, losses, tokens, the speed that follows, and curves that stay
                         small
    result.py            What a training leaves behind, for the output of a cell
    run.py               One training run as a front end sees it: counts, curves and speed, fed by any loop
    run_checkpointer.py  Keeps a training on disk as it goes on: when its process dies, some seconds of it are lost
    tracebacks.py        Lets go of tensors that a stored traceback would keep alive
"""
