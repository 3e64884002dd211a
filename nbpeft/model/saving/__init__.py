"""Between adapters in memory and files on disk: what is saved, what is loaded, what is merged into a copy.

Door, what other rooms import:

    files.py          Loading and saving the adapters of a manager: the step between the engine and the checkpoint
                      package
    given_configs.py  The config objects that people give: as in PEFT an adapter has the very object, filled in
    merge_deltas.py   What adapters add to the weights of a base model: those on a live model, or one saved in a
                      folder
    merge_export.py   Merging into a full-precision copy on disk, shard by shard, and the error of each way to merge
    merge_weights.py  The base weights of a merge: those of a model in memory, dequantized one by one, or of a
                      folder's files
    saved_places.py   Which adapters of this process are in which folder as they are now: saved to it, or loaded from
                      it
    sharded.py        Tensors of which each process has a part: FSDP2's (``DTensor``), and those of DeepSpeed's
                      ZeRO-3, which are empty

Inside:

    residuals.py  Files of adapters that start in a part of the base, for a base without that part
"""
