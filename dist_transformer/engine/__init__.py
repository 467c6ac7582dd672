"""DeepSpeed around the model: the only importer of deepspeed. Steps, checkpoints, the update rule."""
