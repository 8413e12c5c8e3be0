"""Recovery: training a pruned model, on one process or sharded over several."""
