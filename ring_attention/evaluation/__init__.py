from ring_attention.checks import require_packages

require_packages(__name__, "matplotlib", "rich")
