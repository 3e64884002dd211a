"""What happens during a run in addition to its steps: sampled answers, trackers, early stopping, divergence.

Door, what other rooms import:

    divergence.py  Ends a training that diverges, and restores the last good weights from memory
    early_stop.py  Early stopping: ends a training when evaluations no longer improve, and restores the best weights
                   from memory
    generation.py  Batched generation: encodes prompts, and decodes tokens to text as they are generated
    prompts.py     The prompts that are answered during a run
    scoring.py     Scores the adapter on held-out rows during a training, like an evaluation
    sampling.py    Samples answers to fixed prompts during a run, of the current adapter and of the base model
    trackers.py    Logs the metrics of a run to TensorBoard, Weights & Biases or Trackio, offline without an account
"""
