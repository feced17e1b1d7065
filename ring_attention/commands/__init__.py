"""The commands of `ring-attention`; train.py and scripts/*.py run the same code from a checkout."""
