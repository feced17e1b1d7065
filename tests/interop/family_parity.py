"""Small random checkpoints of a family that transformers itself wrote, and what it and we make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax import lax
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.models.hf.loading import load_parameters
from ring_attention.models.hf.names import leaf
from ring_attention.models.hf.source import expected, open_source
from ring_attention.models.transformer import model_builder, parameter_specs
from ring_attention.training.attend import attention_of
from ring_attention.training.config import AttentionConfig

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

BOUND = 1e-4
LENGTH, VOCABULARY = 96, 128
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, (1, LENGTH + 1))
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=None,  # with one, torch gives that row of the embedding no gradient
    bos_token_id=1,
    eos_token_id=2,
)
AXES = ("dp", "fsdp", "sp")
BATCH = Spec(("dp", "fsdp"), "sp")


def make_checkpoint(folder, config_class, model_class, values, seed=0):
    """Save a checkpoint in shards; every norm and bias is one that matters. Return the model, in float32."""
    config = getattr(transformers, config_class)(**values)
    torch.manual_seed(seed)
    gemma = "gemma" in config.model_type  # whose norms are 1 + weight, and whose embeddings are multiplied by 8
    model = getattr(transformers, model_class)._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0.0 if gemma else 1.0, 0.3)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.5)
            else:
                embedding = 0.08 if gemma else 0.5
                parameter.normal_(0, parameter.shape[-1] ** -0.5 if "embed" not in name else embedding)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def their_logits(model, length=LENGTH):
    """float32 [1, length, V]."""
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS[:, :length])).logits.numpy()


def mesh_of(**axes):
    """A mesh of the first simulated devices."""
    return ra.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


class OurModel:
    """A checkpoint on a mesh; `change(model, params) -> (model, params)` makes another model of it."""

    def __init__(self, folder, mesh, strategy="ring", change=None, **attention):
        self.source, self.mesh = open_source(folder), mesh
        fields = self.source.config.attention_fields | dict(strategy=strategy, layout="zigzag") | attention
        self.attention = AttentionConfig(**fields)
        self.model, self.params = self.source.config.model, load_parameters(self.source, mesh)
        if change is not None:
            self.model, self.params = change(self.model, self.params)
        self.transformer = self.attention.completed(self.model)
        self.layout = self.attention.make_layout(mesh.shape["sp"])

    def _run(self, call, params, tokens, out_specs):
        """call(model, tokens, targets, options) on each device, of the tokens but the last, in the natural order."""
        build = model_builder(self.transformer)
        attend = attention_of(self.attention, self.transformer, self.mesh.shape["sp"])

        def on_device(params, tokens, targets, positions):
            return call(build(params), tokens, targets, dict(positions=positions, segment_ids=None, attend=attend))

        specs = (parameter_specs(self.transformer), BATCH, BATCH, BATCH)
        positions = np.arange(tokens.shape[1] - 1)[None]
        arrays = (tokens[:, :-1], tokens[:, 1:], positions)
        dealt = (self.layout.permute(jnp.asarray(x, jnp.int32), 1) for x in arrays)
        return jax.shard_map(on_device, mesh=self.mesh, in_specs=specs, out_specs=out_specs)(params, *dealt)

    def logits(self, length=LENGTH):
        """float32 [1, length, V]."""
        call = lambda model, tokens, targets, options: model.logits(tokens, **options)  # noqa: E731
        run = jax.jit(lambda params: self._run(call, params, TOKENS[:, : length + 1], Spec(*BATCH, "tp")))
        return np.asarray(self.layout.unpermute(run(self.params), 1))

    def gradients(self):
        """The gradient of the mean loss of each tensor of the checkpoint, by its name."""

        def call(model, tokens, targets, options):
            return lax.psum(model.token_losses(tokens, targets, **options).sum(), AXES) / LENGTH

        grads = jax.jit(jax.grad(lambda params: self._run(call, params, TOKENS, Spec())))(self.params)
        found = {}
        for name, tensor in expected(self.source).items():
            parts = []
            for part in tensor.parts:
                array = np.asarray(leaf(grads, part.parameter))
                parts.append(part.to_tensor(array if part.layer is None else array[part.layer]))
            found[name] = np.concatenate(parts)
        return found


def their_gradients(model):
    """The gradient of the mean loss of each parameter, by its name."""
    model.zero_grad()
    logits = model(torch.as_tensor(TOKENS[:, :-1])).logits[0]
    torch.nn.functional.cross_entropy(logits, torch.as_tensor(TOKENS[0, 1:])).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def their_continuation(model, prompt, new):
    """The greedy continuation, a list."""
    tokens = torch.as_tensor(prompt)[None]
    options = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(tokens))
    return model.generate(tokens, **options)[0, prompt.size :].tolist()


def require_their_gradients(folder, model, **axes):
    """Fail unless our gradient of each tensor is that of torch, on a mesh with these axes."""
    theirs, ours = their_gradients(model), OurModel(folder, mesh_of(**axes)).gradients()
    assert set(ours) == set(theirs)
    for name, want in theirs.items():
        assert np.linalg.norm(want) > 0
        assert np.linalg.norm(ours[name] - want) < 1e-4 * np.linalg.norm(want), name
