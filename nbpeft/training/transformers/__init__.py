"""transformers' ``Trainer`` with adapters: its arguments, and nbpeft's changes to it.

Door, what other rooms import:

    argument_source.py    The fields of ``TrainingArguments``, read from its source: importing it takes a second or two
                          if PEFT is installed
    arguments.py          Training arguments by name, with defaults for notebooks
    objective_trainer.py  The Trainer that computes the loss of an objective
    trainer.py            ``nbpeft.Trainer``: transformers' Trainer for models with adapters, with losses computed in
                          chunks
    trainer_patch.py      The one place where nbpeft changes other libraries: they accept its models and configs like
                          PEFT's
    unused_fields.py      Fields of the arguments class that a training does not use, because of what is given beside
                          them

Inside:

    adapter_mixins.py  Methods of other libraries that import PEFT when they are called, for models and configs of
                       nbpeft
    import_hook.py     Calls a function right after a module of another library is imported, now or later
"""
