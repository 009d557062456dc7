"""The engine: one update, the loop around it, evaluation, checkpoints, and a process's place in a distributed run."""
