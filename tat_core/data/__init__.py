"""A hospital's images: reading, degrading, preparing, sampling."""
