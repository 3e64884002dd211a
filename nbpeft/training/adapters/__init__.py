"""What a training needs to know about its model's adapters: trainable parameters, extra losses, training state.

Door, what other rooms import:

    adapted_model.py    Facts about a model with adapters that a training needs, whatever wraps the model
    extra_loss.py       Adds the loss terms of methods (AdaLoRA, KaSA, MonteCLoRA) in a Trainer exactly once, whatever
                        ``compute_loss`` does
    learning_check.py   Checks in the first steps whether the adapter learns; reports in one line with the remedy
    method_state.py     The training state of a method that is not in the adapter's file: pruned ranks, moving
                        averages, generators
    optimizer_steps.py  The one place that calls methods with training hooks (``LearnsWithHooks``) after a step
    shards.py           Which tensors of a quantized base FSDP2 can shard, and how they must be stored for it
    snapshot.py         A copy in host memory of a model's trainable parameters, to restore them without a folder
"""
