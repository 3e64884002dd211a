"""``train(model, data)``: prepares rows, and creates, runs and closes a Trainer.

Door, what other rooms import:

    checks.py     What a training refuses before it reads rows, and before it changes the model
    objective.py  The objective of a training: the one that is named, or the one that follows from the rows
    packing.py    Packing several rows into one sequence, for models that do not mix packed rows
    prepare.py    Preparing a quantized base model for training adapters
    rows.py       Preparing the training and evaluation rows for a model, and checking them
    train.py      ``train(model, data)``: training in one call

Inside:

    fitting.py          Runs a Trainer in this process, and removes everything of it from the model afterwards
    grouping.py         Batches of rows with similar lengths, to reduce padding
    learning_rate.py    The learning rate of a training that is given none
    late_evaluation.py  Scores and an evaluation that a run was stopped or killed before: a resumed run makes them
    restoring.py        Leaves a model as it was found before a training, except for the trained weights
    sampled_rows.py     The prompts to answer during a run: given, or taken from the rows with their wanted answers
"""
