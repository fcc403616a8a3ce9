"""What each step cost: accuracy, fidelity, latency, and the report."""
