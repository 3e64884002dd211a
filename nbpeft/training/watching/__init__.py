"""What goes on during a run besides its steps: answers, trackers, stopping early or when it diverges.

Door, what other rooms import:

    divergence.py  Ends a training that diverges, and puts the last good weights back: in memory, without a folder
    early_stop.py  Stopping when evaluations get no better, with the best state put back: in memory, without a folder
    generation.py  Batched generation: prompts to tokens, and tokens to text while they come
    sampling.py    Answers to fixed prompts while a run goes on: the adapter as it is then, beside the base model
    trackers.py    Hands the numbers of a run to TensorBoard, Weights & Biases or Trackio, without a network where
                   none is set up

Door, what other rooms import:

    divergence.py  Ends a training that diverges, and puts the last good weights back: in memory, without a folder
    early_stop.py  Stopping when evaluations get no better, with the best state put back: in memory, without a folder
    generation.py  Batched generation: prompts to tokens, and tokens to text while they come
    sampling.py    Answers to fixed prompts while a run goes on: the adapter as it is then, beside the base model
    trackers.py    Hands the numbers of a run to TensorBoard, Weights & Biases or Trackio, without a network where
                   none is set up
"""
