"""The handle on a base model with adapters: ``PeftModel``, its task classes and what is called on it.

Door, what other rooms import:

    arrow.py        ``create_arrow_model``: a model whose tokens are routed over several saved adapters (Arrow,
                    GenKnowSub)
    auto.py         AutoPeftModel: a saved adapter together with the base model it names
    functional.py   Functions under the names of ``peft.functional`` and ``peft.utils``: for models with or without a
                    handle
    helpers.py      Small helpers under the names of ``peft.helpers``
    injection.py    Adapters on a model without a handle: ``inject_adapter_in_model``
    peft_model.py   PeftModel: the handle on a base model with adapters
    serving.py      Which adapters serve a call: the active ones, one for each row of a mixed batch, or a weighted sum
    state_dicts.py  State dicts: an adapter's under the keys of PEFT's files, and the base model's without its
                    adapters
    status.py       PEFT's status records of layers and models
    tasks.py        The task classes of PEFT, and the way in: ``get_peft_model``
    tuner.py        ``PeftModel.base_model``: what PEFT puts between the handle and the base model

Inside:

    prompts.py  What PEFT's users reach for on a handle with a learned prompt: the prompts, their encoders and tokens
"""
