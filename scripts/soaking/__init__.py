"""Parts of `scripts/soak.py`: processes that can be killed, what they must leave, and the faults themselves."""
