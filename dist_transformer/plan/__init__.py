"""Memory and time of a run before it is submitted: the model's own code on the meta device, and what ZeRO adds."""
