"""The only place that knows devices. `reference` is plain torch, runs everywhere and is what every other kernel
equals."""
