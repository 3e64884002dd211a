"""What a training writes and resumes from, with one process or several.

Door, what other rooms import:

    agreement.py        What the processes of one training agree on; in a training of one process each of these does
                        nothing
    checkpoints.py      Checkpoints of a Trainer: each is whole or not there, and resuming passes over those that are
                        not
    kept_arguments.py   The arguments of a training that its run keeps, and those that a resumed one takes over from
                        there
    save_now.py         Saving what is trained while the run goes on, because a person asked for it
    sharded_trainer.py  What a Trainer does instead where FSDP2 shards a model of ours: files hold every process's
                        part of the adapters

Inside:

    checkpoint_damage.py  Whether the small files of a checkpoint can be resumed from: read as a Trainer reads them,
                          before it does

Door, what other rooms import:

    agreement.py        What the processes of one training agree on; in a training of one process each of these does
                        nothing
    checkpoints.py      Checkpoints of a Trainer: each is whole or not there, and resuming passes over those that are
                        not
    kept_arguments.py   The arguments of a training that its run keeps, and those that a resumed one takes over from
                        there
    save_now.py         Saving what is trained while the run goes on, because a person asked for it
    sharded_trainer.py  What a Trainer does instead where FSDP2 shards a model of ours: files hold every process's
                        part of the adapters

Inside:

    checkpoint_damage.py  Whether the small files of a checkpoint can be resumed from: read as a Trainer reads them,
                          before it does
"""
