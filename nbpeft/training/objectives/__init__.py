"""What a training minimizes: one file per objective, which names its rows, its fields, its loss and its curves.

Other code adds an objective by deriving a class from :class:`Objective` and calling ``register``; unlike methods,
objectives have no entry point, so that its module has to be imported first.
These files import torch only when a loss is computed, because completion lists their fields.

Door, what other rooms import:

    classification.py  Metrics of evaluations of classifiers: accuracy and F1
    collator.py   Batches of rows with a chosen and a rejected completion
    grpo.py       Group Relative Policy Optimization
    log_probs.py  Log-probabilities of completions, without the logits of all tokens in memory at once
    objective.py  The base class of objectives, and their registry
    reference.py  The reference of an objective: the base, another adapter, or the weights at the beginning
    reference_cache.py  Log-probabilities of the reference that were computed before
    usual.py   The objectives whose loss is the model's own: ``sft`` and ``classify``

Inside:

    cpo.py     Contrastive Preference Optimization, and SimPO
    dpo.py     Direct Preference Optimization
    kto.py     Kahneman-Tversky Optimization
    orpo.py    Odds Ratio Preference Optimization
    reward.py  Reward models: a classifier of texts with one label, whose logit is the reward of a text
"""

from nbpeft.training.objectives.cpo import Cpo, Simpo
from nbpeft.training.objectives.dpo import Dpo
from nbpeft.training.objectives.grpo import Grpo
from nbpeft.training.objectives.kto import Kto
from nbpeft.training.objectives.objective import register
from nbpeft.training.objectives.orpo import Orpo
from nbpeft.training.objectives.reward import Reward
from nbpeft.training.objectives.usual import Classify, Sft

for _objective in (Sft, Classify, Dpo, Orpo, Simpo, Cpo, Kto, Reward, Grpo):
    register(_objective)
