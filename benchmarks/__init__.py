"""Tasks, the paired run over stacks, and its report."""
