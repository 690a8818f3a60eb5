"""The coordinator: one ServerApp that aggregates what hospitals report."""
