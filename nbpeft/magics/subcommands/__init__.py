"""The subcommands of ``%lora`` and the cell magics, one file for each group; a new file needs no edit elsewhere."""
