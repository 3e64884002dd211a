"""What a training has to know of the adapters in its model: what trains, extra losses, state besides weights.

Door, what other rooms import:

    adapted_model.py    Questions that training has about a model with adapters, whatever wraps it
    extra_loss.py       What methods add to the loss (AdaLoRA, KaSA, MonteCLoRA) in a Trainer: once, whatever its
                        ``compute_loss`` does
    learning_check.py   Checks at the first steps whether the adapter learns; reports in one line with the remedy
    method_state.py     What a resumed training needs of a method besides the adapter's file: pruned ranks, moving
                        averages, generators
    optimizer_steps.py  The one place where methods that learn with hooks (``LearnsWithHooks``) get their turn in a
                        training step
    snapshot.py         What trains in a model at one moment, copied to host memory, to be put back without a folder

Door, what other rooms import:

    adapted_model.py    Questions that training has about a model with adapters, whatever wraps it
    extra_loss.py       What methods add to the loss (AdaLoRA, KaSA, MonteCLoRA) in a Trainer: once, whatever its
                        ``compute_loss`` does
    learning_check.py   Checks at the first steps whether the adapter learns; reports in one line with the remedy
    method_state.py     What a resumed training needs of a method besides the adapter's file: pruned ranks, moving
                        averages, generators
    optimizer_steps.py  The one place where methods that learn with hooks (``LearnsWithHooks``) get their turn in a
                        training step
    snapshot.py         What trains in a model at one moment, copied to host memory, to be put back without a folder
"""
