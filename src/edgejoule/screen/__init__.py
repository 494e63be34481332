"""Stage 1: choosing candidates without a device."""
