"""``PeftModel``, its task classes, and the functions that PEFT provides for it.

Door, what other rooms import:

    arrow.py        ``create_arrow_model``: routes tokens over several saved adapters (Arrow, GenKnowSub)
    auto.py         AutoPeftModel: loads a saved adapter together with its base model
    functional.py   The functions of ``peft.functional`` and ``peft.utils``, for models with or without a PeftModel
    helpers.py      The functions of ``peft.helpers``
    injection.py    ``inject_adapter_in_model``: adapters on a model without a PeftModel
    peft_model.py   PeftModel: the wrapper of a base model with adapters
    serving.py      Which adapters serve a call: the active ones, one for each row of a mixed batch, or a weighted sum
    state_dicts.py  State dicts of adapters under the keys of PEFT's files, what a file leaves out, and state dicts of
                    the base model without its adapters
    status.py       PEFT's status records of layers and models
    tasks.py        PEFT's task classes, and ``get_peft_model``
    tuner.py        ``PeftModel.base_model``: the object that PEFT has between the PeftModel and the base model

Inside:

    listed_modules.py  Modules that PEFT keeps on ``base_model`` and not in the layers
    prompts.py         PEFT's interface to learned prompts on a PeftModel: the prompts, their encoders and tokens
    tuner_type.py      The class of PEFT's tuner classes: refuses scripts that replace what puts in PEFT's layers
"""
