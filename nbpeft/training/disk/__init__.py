"""The files that a training writes and resumes from, with one process or several.

Door, what other rooms import:

    agreement.py        Communication between the processes of one training; without effect in a single process
    checkpoints.py      Atomic checkpoints of a Trainer; resuming skips incomplete ones
    kept_arguments.py   The arguments of a training that are stored with its run, and those that a resumed run reuses
    save_now.py         Saving the adapters during a run, at the user's request
    sharded_trainer.py  A Trainer's saving and loading of an adapted model under FSDP2: files contain the gathered
                        adapters

Inside:

    checkpoint_damage.py  Checks that the small files of a checkpoint can be resumed from, before a Trainer reads them
"""
