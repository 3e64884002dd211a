"""The verbs of ``%lora``, one file for each group; a new file needs no edit elsewhere."""
