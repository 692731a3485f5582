"""How the peers' functions are called; each is imported by whoever asks for it.

A factory returns ``fn(hidden (N, H), weight (V, H), target (N,)) -> logp`` in nats, 0 where the
target is -100, or their sum where a peer gives no more; of logits (N, V), ``fn(logits, target)``.
"""

from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F


def from_logits(logits, target):
    """Plain torch: bf16 logits are widened first, else the log-probs themselves would round."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(wide, target, reduction="none")


def from_hidden(hidden, weight, target):
    return from_logits(hidden @ weight.t(), target)


def from_wide_product(hidden, weight, target):
    """Logits that were never rounded: the yardstick of accuracy."""
    if hidden.device.type == "cuda":
        return from_logits(torch.mm(hidden, weight.t(), out_dtype=torch.float32), target)
    return from_logits(hidden.float() @ weight.float().t(), target)


def need_cuda():
    if not torch.cuda.is_available():
        raise RuntimeError("its Triton kernels need a CUDA device")


def trl_head():
    """The head that TRL's trainers put on a model, reached as they do, under a trunk of nothing."""
    from trl.trainer.utils import add_fused_lm_head

    class Trunk:
        config = SimpleNamespace(get_text_config=SimpleNamespace)

        def forward(self):
            pass

        def base_model(self, hidden, use_cache):
            return SimpleNamespace(last_hidden_state=hidden)

        def get_output_embeddings(self):
            return SimpleNamespace(weight=self.weight, bias=None)

    model = Trunk()
    add_fused_lm_head(model)

    def fn(hidden, weight, target):
        model.weight = weight
        return model.forward(
            hidden=hidden[None], shift_labels=target[None], fused_lm_head=True
        ).log_probs[0]

    return fn


def trl_head_rows_dropped():
    """On the CPU too, where TRL computes ignored rows: what it asks there is made to say CUDA."""
    import trl.trainer.utils

    fn = trl_head()

    def dropping(*args):
        with mock.patch.object(trl.trainer.utils, "_use_triton", return_value=True):
            return fn(*args)

    return dropping


def liger_cross_entropy(budget, reduction):
    """Gradients in the forward, in ``budget`` times the bytes of hidden; "sum" has no others."""
    need_cuda()
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    options = {"reduction": reduction, "chunk_mem_const": budget}
    return lambda *inputs: -liger_fused_linear_cross_entropy(*inputs, **options)


def liger_scaled():
    """Per-token, with any gradient: CuTe on Hopper, chunks of 512 rows in torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return lambda *inputs: -LigerFusedLinearScaledCrossEntropyFunction.apply(*inputs)


def liger_dpo(pairs, beta):
    """The whole loss of mean log-probs; compiled, a pair at a time."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(use_ref_model=False, average_log_prob=True, beta=beta)

    def fn(hidden, weight, target):
        shape = (2 * pairs, -1)
        return loss(weight, hidden.view(*shape, hidden.shape[-1]), target.view(shape))[0]

    return fn


def cut_cross_entropy(device, filter_eps):
    """Its Triton kernels; on the CPU its torch path, which filters nothing."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if device == "cuda" else "torch_compile"
    options = {"reduction": "none", "impl": impl, "filter_eps": filter_eps}
    return lambda *inputs: -linear_cross_entropy(*inputs, **options)


def trl_from_logits():
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def liger_from_logits():
    """Writes the gradient over the logits, in the forward."""
    need_cuda()
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, target: -liger_cross_entropy(logits, target, reduction="none")


def liger_grpo(chunk, clip, kl_coef):
    """GRPO's loss, ``fn(hidden (B, T, H), weight, target (B, T), mask, advantages (B,), old_logp,
    ref_logp)``, with gradients in the forward; ``chunk`` sequences at a time, of which 1 is its own
    choice; compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(kl_coef, chunk_size=chunk, epsilon_low=clip, epsilon_high=clip)

    def fn(hidden, weight, target, mask, advantages, old_logp, ref_logp):
        models = {"old_per_token_logps": old_logp, "ref_per_token_logps": ref_logp}
        return loss(hidden, weight, target, mask, advantages, **models)[0]

    return fn


def liger_grpo_from_logits(clip, kl_coef):
    """The same of its Triton kernels, which write the gradient over the logits."""
    need_cuda()
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    options = {"beta": kl_coef, "eps_low": clip, "eps_high": clip, "temperature": 1.0}

    def fn(hidden, weight, target, mask, advantages, old_logp, ref_logp):
        logits = F.pad(hidden, (0, 0, 0, 1)) @ weight.t()  # of what follows the last token too
        models = (logits, old_logp, ref_logp)
        return triton_grpo_loss(*models, target, advantages, mask, reduce=True, **options)[0]

    return fn
