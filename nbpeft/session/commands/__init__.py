"""The commands of a session: plain functions with the session's context, grouped by topic.

Files:

    adapters.py    Adding, previewing, loading, saving, deleting, renaming and copying adapters
    asking.py      Asking the active adapters, or others, for one answer, and conversations
    combining.py   Combining adapters into a new one by weights
    comparing.py   Comparing the answers of adapters, and of combinations of them, to the same prompts
    converting.py  Converting an adapter of another method to LoRA
    data.py        Inspecting training data before a training
    inspecting.py  Inspecting how much an adapter changes each layer of a model
    listing.py     Listing the methods, and what each would cost on a model
    merging.py     Merging adapters into the base weights, and unloading all of them
    planning.py    Forecasting memory: whether a run will fit, before it starts
    pushing.py     Uploading an adapter to the hub, with a model card
    quantizing.py  QLoRA in one command: load or quantize a model, prepare it for training, add an adapter; and its dry
                   run
    running.py     Trainings in the background, and requests to a running one: stop, pause, continue, clone
    runs.py        Runs on disk: listing and comparing them, resuming an interrupted one, renaming and deleting
    scoring.py     Scoring the base model and its adapters on rows with references
    shipping.py    Shipping an adapter: whether a serving engine supports it, and writing the files that it loads
    swapping.py    Hot-swapping: replacing an adapter on the model by a saved one
    switching.py   Which adapters are active, their scale, and which are trained
    training.py    Training: with transformers' Trainer, in a custom loop, or as a script
    undoing.py     Restoring deleted and replaced adapters, and resetting one to its initial weights
"""
