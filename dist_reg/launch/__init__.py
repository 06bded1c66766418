"""Starting runs on clusters: torchrun on every node, SLURM jobs, and what they leave behind."""
