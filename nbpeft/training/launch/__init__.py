"""Training in several processes, for one that waits: a notebook's.

    notebook                                 process 0              process 1 …
    train(…, processes=2)
      └ job.pt: TrainRequest ──────────────> train(…)  <─DDP/FSDP2─> train(…)
      Run.mirror(state)       <── states ──   Run
      RunControl              ── requests ─>  SharedControl ──────── the same step
      load_adapters(result/)  <── adapter ──  end

The processes get the variables that ``torch.distributed.run`` and ``accelerate launch`` set, so that a Trainer does in
them what it does under those. They are started without either: ``accelerate launch`` starts one process on a CPU,
whatever ``--num_processes`` says, follows a configuration file of the machine in what the cell decides (precision,
devices), and puts a process of torch between, which hands on neither requests nor states, nor ends with the notebook's.
Nothing of the notebook's model changes before the trained adapter is there. Where the notebook's process is killed, the
others end after the step that they are in, or within seconds where that does not end, and remove the copy of the model
that it had made for them.
"""
