"""``train(model, data)``: rows made ready, a Trainer made, run and closed."""
