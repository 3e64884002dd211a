"""Learning from rewards: the model in training answers the prompts of rows, and functions score its completions.

    rows ── PromptOrder ──> prompts of a step ── generate ──> completions ── Rewards ──> advantages ──> loss

Door, what other rooms import:

    functions.py  The reward functions of a training: what they are called with, and what they may return
    rollouts.py   Completions, and batches of them to learn
    trainer.py    The Trainer that generates completions before each step

Inside:

    order.py  The order of prompts, each as often as it is answered
"""
