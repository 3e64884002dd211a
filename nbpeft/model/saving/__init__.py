"""Saving, loading and merging: the connection between adapters in memory and files on disk.

Door, what other rooms import:

    files.py          Saving the adapters of a manager, in folders and on the hub
    user_configs.py   Users' config objects: as in PEFT the adapter's config is the same object, with added values
    loading.py        Loading adapters onto the model of a manager: files are read and checked before the model changes
    merge_deltas.py   The deltas of adapters for a merge: of adapters on a loaded model, or of a saved adapter
    merge_export.py   Merging into a full-precision copy on disk, shard by shard, and measuring merge errors
    merge_weights.py  The base weights for a merge: from a model in memory, dequantized one by one, or from the files
                      of a folder
    offloaded.py      Tensors that accelerate keeps elsewhere between calls
    saved_places.py   Which adapters of this process are identical to which folder: saved to it or loaded from it
    sharded.py        Tensors that are sharded over processes: FSDP2's ``DTensor`` and DeepSpeed ZeRO-3, whose shards
                      look empty

Inside:

    residuals.py  Files of adapters whose init changes the base weights, for a base without that change
"""
