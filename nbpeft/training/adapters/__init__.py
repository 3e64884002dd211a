"""What a training has to know of the adapters in its model: what trains, extra losses, state besides weights."""
