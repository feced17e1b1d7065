"""Parts of `scripts/verify/soak`: processes that can be killed, what they must leave, and the faults themselves."""
