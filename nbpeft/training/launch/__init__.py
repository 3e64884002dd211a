"""Training in several processes, started by the process of a notebook, which waits for them.

    notebook                                 process 0              process 1 …
    train(…, processes=2)
      └ job.pt: TrainRequest ──────────────> train(…)  <─DDP/FSDP2─> train(…)
      Run.mirror(state)       <── states ──   Run
      RunControl              ── requests ─>  SharedControl ──────── the same step
      load_adapters(result/)  <── adapter ──  end

The processes get the environment variables that ``torch.distributed.run`` and ``accelerate launch`` set, so that a
Trainer behaves in them as under those. They are started without either: ``accelerate launch`` starts one process on a
CPU, whatever ``--num_processes`` says; a configuration file of the machine overrides what the cell sets (precision,
devices); and it puts a process of torch in between, which forwards neither requests nor states and does not end
together with the notebook's.

The notebook's model does not change before the trained adapter is complete. If the notebook's process is killed, the
others end after the current step, or within seconds if that does not end, and remove the copy of the model that was
made for them.
"""
