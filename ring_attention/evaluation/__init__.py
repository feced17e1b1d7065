from ring_attention.checks import require_train

require_train(__name__)
