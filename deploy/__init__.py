"""Deployment files; holds no logic."""
