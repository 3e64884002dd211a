"""transformers' ``Trainer`` with adapters: its arguments, and what nbpeft changes in it.

Door, what other rooms import:

    argument_source.py  What ``TrainingArguments`` takes, read from its source: importing it takes a second or two
                        where PEFT is installed
    arguments.py        Training arguments by name, with defaults that suit a notebook
    trainer.py          ``nbpeft.Trainer``: transformers' Trainer, which knows adapters once it is patched, and
                        computes losses in chunks
    trainer_patch.py    The one place where nbpeft changes other libraries: they take our models and configs as they
                        take PEFT's

Inside:

    adapter_mixins.py  Methods of other libraries that look for PEFT when they are called, for models and configs of
                       nbpeft
    import_hook.py     Runs a function right after a module of another library is imported, now or later

Door, what other rooms import:

    argument_source.py  What ``TrainingArguments`` takes, read from its source: importing it takes a second or two
                        where PEFT is installed
    arguments.py        Training arguments by name, with defaults that suit a notebook
    trainer.py          ``nbpeft.Trainer``: transformers' Trainer, which knows adapters once it is patched, and
                        computes losses in chunks
    trainer_patch.py    The one place where nbpeft changes other libraries: they take our models and configs as they
                        take PEFT's

Inside:

    adapter_mixins.py  Methods of other libraries that look for PEFT when they are called, for models and configs of
                       nbpeft
    import_hook.py     Runs a function right after a module of another library is imported, now or later
"""
