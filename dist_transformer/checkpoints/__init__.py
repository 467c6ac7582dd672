"""The files of checkpoints: what they hold, where a run keeps them, reading them in any layout. Knows no engine."""
